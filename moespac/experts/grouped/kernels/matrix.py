"""Many tokens of each expert (prompts): matrix products on the tensor cores, 64 tokens of an expert a program.

Inputs and weights are multiplied in the trunk's type and summed in float32, as torch's own matmul does it: int8
weights exactly, scaled at the end; int4 ones rounded to that type, as ``ExpertMath`` decodes them.
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
def _multiply(x, weights, sums):
    """sums (T, N) + x (T, C) times weights (N, C), in x's type; float32 is not cut to the tensor cores' 19 bits."""
    return tl.dot(x, tl.trans(weights.to(x.dtype)), sums, input_precision="ieee")


@triton.jit
def _in_groups(weights, scale, minimum, GROUPS: tl.constexpr):
    """weights (N, GROUPS * 16), each group of 16 in its scale and minimum (N, GROUPS)."""
    grouped = tl.reshape(weights, (weights.shape[0], GROUPS, 16))
    return tl.reshape(grouped * scale[:, :, None] + minimum[:, :, None], weights.shape)


@triton.jit
def _products(
    record,
    n,
    x,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_FORMAT: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows n (ROWS,) of a matrix times the inputs at the pointers x (TOKENS,): (TOKENS, ROWS)."""
    operand = tl.float32 if OPERAND == "f32" else tl.bfloat16 if OPERAND == "bf16" else tl.float16
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    if FORMAT == "int4":
        HALF: tl.constexpr = CHUNK // 2  # bytes
        GROUPS: tl.constexpr = (COLUMNS + 31) // 32
        WHOLE: tl.constexpr = GROUPS * 16 % HALF == 0
        row_scales = typed(record + ROW_SCALES, "f32") + 2 * n
        row_scale = tl.load(row_scales)[:, None]
        row_minimum = tl.load(row_scales + 1)[:, None]
        for start in range(0, GROUPS * 16, HALF):
            b = start + tl.arange(0, HALF)
            at = n[:, None] * (GROUPS * 16) + b[None, :]
            bytes = load(record + VALUES + at, (b < GROUPS * 16)[None, :], WHOLE)
            group = start // 16 + tl.arange(0, HALF // 16)
            at = n[:, None] * GROUPS + group[None, :]
            within = (group < GROUPS)[None, :]
            scale = byte_to_float(load(record + SCALES + at, within, WHOLE)) * row_scale
            minimum = signed_byte_to_float(load(record + MINIMA + at, within, WHOLE)) * row_minimum
            c = b // 16 * 32 + b % 16
            low = _in_groups(byte_to_float(bytes & 15), scale, minimum, HALF // 16)
            high = _in_groups(byte_to_float(bytes >> 4), scale, minimum, HALF // 16)
            x_low = load(x[:, None] + c[None, :], (c < COLUMNS)[None, :], COLUMNS % CHUNK == 0)
            x_high = load(x[:, None] + c[None, :] + 16, (c + 16 < COLUMNS)[None, :], COLUMNS % CHUNK == 0)
            sums = _multiply(x_low.to(operand), low, sums)
            sums = _multiply(x_high.to(operand), high, sums)
    else:
        WHOLE: tl.constexpr = COLUMNS % CHUNK == 0
        for start in range(0, COLUMNS, CHUNK):
            c = start + tl.arange(0, CHUNK)
            at = n[:, None] * COLUMNS + c[None, :]
            if FORMAT == "int8":
                weights = signed_byte_to_float(load(record + VALUES + at, (c < COLUMNS)[None, :], WHOLE))
            else:
                weights = load(typed(record + VALUES, FORMAT) + at, (c < COLUMNS)[None, :], WHOLE)
            inputs = load(x[:, None] + c[None, :], (c < COLUMNS)[None, :], WHOLE)
            sums = _multiply(inputs.to(operand), weights, sums)
    if FORMAT == "int8":
        sums *= tl.load(typed(record + SCALES, "f32") + n)[None, :]
    return add_bias(sums, record, n, BIAS, BIAS_FORMAT)


@triton.jit
def matrix_up(
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
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As ``vector_up``, for up to TOKENS rows a job."""
    job = jobs + tl.program_id(0) * (TOKENS + 1)
    record = arena + tl.load(job).to(tl.int64) * RECORD
    rows = tl.load(job + 1 + tl.arange(0, TOKENS)).to(tl.int64)
    inputs = x + tl.maximum(rows, 0) // TOP_K * COLUMNS
    UNITS: tl.constexpr = ROWS if GATE == "none" else ROWS // 2
    first = tl.program_id(1) * UNITS
    sums = _products(
        record,
        up_rows(first, UNITS, WIDTH, GATE),
        inputs,
        COLUMNS,
        FORMAT,
        VALUES,
        SCALES,
        MINIMA,
        ROW_SCALES,
        BIAS,
        BIAS_FORMAT,
        OPERAND,
        TOKENS,
        ROWS,
        CHUNK,
    )
    y = gated(sums, UNITS, GATE, ACTIVATION, ALPHA, LIMIT, OFFSET)
    u = first + tl.arange(0, UNITS)
    tl.store(inner + rows[:, None] * WIDTH + u[None, :], y, mask=(rows >= 0)[:, None] & (u < WIDTH)[None, :])


@triton.jit
def matrix_down(
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
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As ``vector_down``, for up to TOKENS rows a job."""
    job = jobs + tl.program_id(0) * (TOKENS + 1)
    record = arena + tl.load(job).to(tl.int64) * RECORD
    rows = tl.load(job + 1 + tl.arange(0, TOKENS)).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = _products(
        record,
        tl.minimum(n, HIDDEN - 1),
        inner + tl.maximum(rows, 0) * COLUMNS,
        COLUMNS,
        FORMAT,
        VALUES,
        SCALES,
        MINIMA,
        ROW_SCALES,
        BIAS,
        BIAS_FORMAT,
        OPERAND,
        TOKENS,
        ROWS,
        CHUNK,
    )
    there = (rows >= 0)[:, None] & (n < HIDDEN)[None, :]
    tl.store(out + rows[:, None] * HIDDEN + n[None, :], sums, mask=there)
