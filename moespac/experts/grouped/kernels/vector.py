"""A few tokens of each expert: dot products on the ordinary cores, in float32, as fast as weights can be read.

One warp computes a few rows of an expert's matrix for up to four of its tokens. Each of its lanes reads 16 bytes
of a row at once and multiplies them with the tokens' inputs for the same columns; lanes meet once, at the end. No
weight goes through shared memory and no warp waits for another: 9 to 20 warps a multiprocessor (by registers) have
2 to 4 KB of loads each in flight, where some 18 KB keep an H100's memory busy and 5 KB an RTX 4090's.

Every token has sums of its own, over columns in one order whatever is beside it: its result does not depend, bit by
bit, on the other tokens, their number, or the other experts of the launch.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from moespac.experts.grouped.kernels.record import (
    add_bias,
    byte_to_float,
    gated,
    load,
    signed_byte_to_float,
    typed,
    up_rows,
)


@triton.jit
def _by_lane(numbers, LANES: tl.constexpr, EACH: tl.constexpr):
    """(N, LANES * EACH) -> (N, LANES): each lane adds up its own, and keeps one register a sum."""
    return tl.sum(tl.reshape(numbers, (numbers.shape[0], LANES, EACH)), axis=2)


@triton.jit
def _add(sums, weights, x, c, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr):
    """sums (N, LANES) + weights (N, C) of columns c (C,) times the inputs x."""
    inputs = load(x + c, c < COLUMNS, WHOLE).to(tl.float32)
    return sums + _by_lane(weights * inputs[None, :], LANES, c.shape[0] // LANES)


@triton.jit
def _add_halves(sums, low, high, x, c, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr):
    """The same for int4: low nibbles of columns c, high ones of columns c + 16."""
    sums = _add(sums, low, x, c, COLUMNS, WHOLE, LANES)
    return _add(sums, high, x, c + 16, COLUMNS, WHOLE, LANES)


@triton.jit
def _in_groups(numbers, scale, minimum, LANES: tl.constexpr):
    """numbers (N, LANES * 16), in the scale and minimum of its lane's group (N, LANES)."""
    grouped = tl.reshape(numbers, (numbers.shape[0], LANES, 16))
    return tl.reshape(grouped * scale[:, :, None] + minimum[:, :, None], numbers.shape)


@triton.jit
def _dots(
    record,
    n,
    x0,
    x1,
    x2,
    x3,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_FORMAT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Rows n (ROWS,) of a matrix times the inputs at x0 .. x3, of which TOKENS are there: four (ROWS,).

    CHUNK numbers of a row (bytes of int4) are read at once, by LANES lanes.
    """
    sum0 = tl.zeros((ROWS, LANES), tl.float32)
    sum1 = tl.zeros((ROWS, LANES), tl.float32)
    sum2 = tl.zeros((ROWS, LANES), tl.float32)
    sum3 = tl.zeros((ROWS, LANES), tl.float32)
    if FORMAT == "int4":
        GROUPS: tl.constexpr = (COLUMNS + 31) // 32
        WHOLE: tl.constexpr = COLUMNS % (2 * CHUNK) == 0
        row_scales = typed(record + ROW_SCALES, "f32") + 2 * n
        row_scale = tl.load(row_scales)[:, None]
        row_minimum = tl.load(row_scales + 1)[:, None]
        for start in range(0, GROUPS * 16, CHUNK):
            b = start + tl.arange(0, CHUNK)
            at = n[:, None] * (GROUPS * 16) + b[None, :]
            bytes = load(record + VALUES + at, (b < GROUPS * 16)[None, :], WHOLE)
            # Counted from 1: were they seen to be aligned, one lane would load the scales of several groups, and
            # pass them on through shared memory to the lanes that have the groups.
            group = start // 16 + tl.arange(1, LANES + 1)
            at = n[:, None] * GROUPS + group[None, :]
            within = (group <= GROUPS)[None, :]
            scale = byte_to_float(load(record + (SCALES - 1) + at, within, WHOLE)) * row_scale
            minimum = signed_byte_to_float(load(record + (MINIMA - 1) + at, within, WHOLE)) * row_minimum
            low = _in_groups(byte_to_float(bytes & 15), scale, minimum, LANES)
            # Sixteen times the high nibble, to be spared the shift.
            high = _in_groups(byte_to_float(bytes & 240), scale * 0.0625, minimum, LANES)
            c = b // 16 * 32 + b % 16
            sum0 = _add_halves(sum0, low, high, x0, c, COLUMNS, WHOLE, LANES)
            if TOKENS > 1:
                sum1 = _add_halves(sum1, low, high, x1, c, COLUMNS, WHOLE, LANES)
                sum2 = _add_halves(sum2, low, high, x2, c, COLUMNS, WHOLE, LANES)
                sum3 = _add_halves(sum3, low, high, x3, c, COLUMNS, WHOLE, LANES)
    else:
        WHOLE: tl.constexpr = COLUMNS % CHUNK == 0
        for start in range(0, COLUMNS, CHUNK):
            c = start + tl.arange(0, CHUNK)
            at = n[:, None] * COLUMNS + c[None, :]
            if FORMAT == "int8":
                weights = signed_byte_to_float(load(record + VALUES + at, (c < COLUMNS)[None, :], WHOLE))
            else:
                values = typed(record + VALUES, FORMAT)
                weights = load(values + at, (c < COLUMNS)[None, :], WHOLE).to(tl.float32)
            sum0 = _add(sum0, weights, x0, c, COLUMNS, WHOLE, LANES)
            if TOKENS > 1:
                sum1 = _add(sum1, weights, x1, c, COLUMNS, WHOLE, LANES)
                sum2 = _add(sum2, weights, x2, c, COLUMNS, WHOLE, LANES)
                sum3 = _add(sum3, weights, x3, c, COLUMNS, WHOLE, LANES)
    scale = tl.load(typed(record + SCALES, "f32") + n) if FORMAT == "int8" else 1.0
    return (
        add_bias(tl.sum(sum0, axis=1) * scale, record, n, BIAS, BIAS_FORMAT),
        add_bias(tl.sum(sum1, axis=1) * scale, record, n, BIAS, BIAS_FORMAT),
        add_bias(tl.sum(sum2, axis=1) * scale, record, n, BIAS, BIAS_FORMAT),
        add_bias(tl.sum(sum3, axis=1) * scale, record, n, BIAS, BIAS_FORMAT),
    )


@triton.jit
def _buffer_rows(job, TOKENS: tl.constexpr):
    """Rows of the (T * k) buffer that this program computes, -1 where it has fewer than four."""
    row0 = tl.load(job + 1)
    if TOKENS > 1:
        return row0, tl.load(job + 2), tl.load(job + 3), tl.load(job + 4)
    else:
        return row0, row0, row0, row0


@triton.jit
def _place(base, row, SIZE: tl.constexpr, TOP_K: tl.constexpr):
    """Where the vector of a buffer row begins; that of row 0 for a row that is not there, and nobody stores."""
    return base + tl.maximum(row, 0).to(tl.int64) // TOP_K * SIZE


@triton.jit
def vector_up(
    x,
    arena,
    jobs,
    inner,
    TOP_K: tl.constexpr,
    RECORD: tl.constexpr,
    WIDTH: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_FORMAT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """inner[row] = gate(up x[row // k]): inner (T * k, WIDTH) float32. Grid (jobs, WIDTH / units of a program)."""
    job = jobs + tl.program_id(0) * (TOKENS + 1)
    record = arena + tl.load(job).to(tl.int64) * RECORD
    row0, row1, row2, row3 = _buffer_rows(job, TOKENS)
    UNITS: tl.constexpr = ROWS if GATE == "none" else ROWS // 2
    first = tl.program_id(1) * UNITS
    sum0, sum1, sum2, sum3 = _dots(
        record,
        up_rows(first, UNITS, WIDTH, GATE),
        _place(x, row0, COLUMNS, TOP_K),
        _place(x, row1, COLUMNS, TOP_K),
        _place(x, row2, COLUMNS, TOP_K),
        _place(x, row3, COLUMNS, TOP_K),
        COLUMNS,
        FORMAT,
        VALUES,
        SCALES,
        MINIMA,
        ROW_SCALES,
        BIAS,
        BIAS_FORMAT,
        TOKENS,
        ROWS,
        CHUNK,
        LANES,
    )
    u = first + tl.arange(0, UNITS)[None, :]
    y0 = gated(sum0[None, :], UNITS, GATE, ACTIVATION, ALPHA, LIMIT, OFFSET)
    tl.store(_place(inner, row0, WIDTH, 1) + u, y0, mask=(u < WIDTH) & (row0 >= 0))
    if TOKENS > 1:
        y1 = gated(sum1[None, :], UNITS, GATE, ACTIVATION, ALPHA, LIMIT, OFFSET)
        y2 = gated(sum2[None, :], UNITS, GATE, ACTIVATION, ALPHA, LIMIT, OFFSET)
        y3 = gated(sum3[None, :], UNITS, GATE, ACTIVATION, ALPHA, LIMIT, OFFSET)
        tl.store(_place(inner, row1, WIDTH, 1) + u, y1, mask=(u < WIDTH) & (row1 >= 0))
        tl.store(_place(inner, row2, WIDTH, 1) + u, y2, mask=(u < WIDTH) & (row2 >= 0))
        tl.store(_place(inner, row3, WIDTH, 1) + u, y3, mask=(u < WIDTH) & (row3 >= 0))


@triton.jit
def vector_down(
    inner,
    arena,
    jobs,
    out,
    RECORD: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_FORMAT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[row] = down inner[row]: out (T * k, HIDDEN) float32. Grid (jobs, HIDDEN / ROWS)."""
    job = jobs + tl.program_id(0) * (TOKENS + 1)
    record = arena + tl.load(job).to(tl.int64) * RECORD
    row0, row1, row2, row3 = _buffer_rows(job, TOKENS)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sum0, sum1, sum2, sum3 = _dots(
        record,
        tl.minimum(n, HIDDEN - 1),
        _place(inner, row0, COLUMNS, 1),
        _place(inner, row1, COLUMNS, 1),
        _place(inner, row2, COLUMNS, 1),
        _place(inner, row3, COLUMNS, 1),
        COLUMNS,
        FORMAT,
        VALUES,
        SCALES,
        MINIMA,
        ROW_SCALES,
        BIAS,
        BIAS_FORMAT,
        TOKENS,
        ROWS,
        CHUNK,
        LANES,
    )
    tl.store(_place(out, row0, HIDDEN, 1) + n, sum0, mask=(n < HIDDEN) & (row0 >= 0))
    if TOKENS > 1:
        tl.store(_place(out, row1, HIDDEN, 1) + n, sum1, mask=(n < HIDDEN) & (row1 >= 0))
        tl.store(_place(out, row2, HIDDEN, 1) + n, sum2, mask=(n < HIDDEN) & (row2 >= 0))
        tl.store(_place(out, row3, HIDDEN, 1) + n, sum3, mask=(n < HIDDEN) & (row3 >= 0))
