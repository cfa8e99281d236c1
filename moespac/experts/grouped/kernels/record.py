"""Device functions that both kernels share: where an expert's numbers lie in its record, and its gate.

A matrix is described to a kernel by constants: its FORMAT, its COLUMNS, and the offsets of its blocks in bytes from
the record's start (VALUES; SCALES, MINIMA and ROW_SCALES where the format has them; BIAS or -1), as format.py lays
them out. Only long-standing parts of Triton's language are used: torch pins the release that comes with it.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; to mypy, tensors and constants look like neither.

import triton
import triton.language as tl


@triton.jit
def typed(pointer, FORMAT: tl.constexpr):
    """A byte pointer, as one to floats of FORMAT."""
    if FORMAT == "f32":
        return pointer.to(tl.pointer_type(tl.float32))
    elif FORMAT == "bf16":
        return pointer.to(tl.pointer_type(tl.bfloat16))
    else:
        return pointer.to(tl.pointer_type(tl.float16))


@triton.jit
def load(pointers, inside, WHOLE: tl.constexpr):
    """Numbers, 0 where not ``inside``. WHOLE: all are, and no instruction is spent on asking."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def byte_to_float(byte):
    """0..255 exactly: as the low bits of 2^23, since converting runs at an eighth of the speed of adding."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def signed_byte_to_float(byte):
    """-128..127 exactly, given as uint8: the sign bit turned over adds 128, which is subtracted with the 2^23."""
    return (byte.to(tl.int32) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def add_bias(sums, record, n, BIAS: tl.constexpr, BIAS_FORMAT: tl.constexpr):
    """sums (..., N) of the matrix rows n (N,)."""
    if BIAS >= 0:
        sums += tl.load(typed(record + BIAS, BIAS_FORMAT) + n).to(tl.float32)
    return sums


@triton.jit
def up_rows(first, UNITS: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr):
    """Rows of the up matrix for the inner units ``first`` .. + UNITS: with a gate, its row beside each one's own.

    Units past the last are taken for the last, so that every load is inside the record; nobody stores them.
    """
    if GATE == "none":
        return tl.minimum(first + tl.arange(0, UNITS), WIDTH - 1)
    else:
        i = tl.arange(0, 2 * UNITS)
        unit = tl.minimum(first + i // 2, WIDTH - 1)
        if GATE == "interleaved":
            return 2 * unit + i % 2
        else:
            return unit + i % 2 * WIDTH


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Comparisons are such that a NaN stays one."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        x = tl.where(x < 0, 0.0, x)
        return x * x


@triton.jit
def gated(
    sums,
    UNITS: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """sums (T, N) of ``up_rows`` -> (T, UNITS), what goes into the down matrix. LIMIT 0 is none."""
    if GATE == "none":
        return activate(sums, ACTIVATION, ALPHA)
    else:
        gate, up = tl.split(tl.reshape(sums, (sums.shape[0], UNITS, 2)))
        if LIMIT > 0:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        return activate(gate, ACTIVATION, ALPHA) * (up + OFFSET)
