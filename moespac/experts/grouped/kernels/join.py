"""One reduction over the experts of each token, whoever computed them."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def join(
    device_rows,
    host_rows,
    source,
    weights,
    joined,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_HOST: tl.constexpr,
):
    """joined[t] = sum over i of weights[t, i] * row[t * k + i], in this order, in float32. Grid (T, columns).

    ``source`` (T * k,) int32 says where a row is: 0 device_rows, 1 host_rows, both (T * k, HIDDEN) float32, or
    2 nowhere; without HAS_HOST all are in device_rows.
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP_K):
        row = token * TOP_K + i
        at = row * HIDDEN + c
        if HAS_HOST:
            where = tl.load(source + row)
            numbers = tl.load(device_rows + at, mask=(c < HIDDEN) & (where == 0), other=0.0)
            of_host = tl.load(host_rows + at, mask=(c < HIDDEN) & (where == 1), other=0.0)
            numbers = tl.where(where == 1, of_host, numbers)
        else:
            numbers = tl.load(device_rows + at, mask=c < HIDDEN, other=0.0)
        # fma by name: were it left to the compiler, the two variants might be rounded differently.
        total = tl.fma(tl.zeros((BLOCK,), tl.float32) + tl.load(weights + row).to(tl.float32), numbers, total)
    tl.store(joined + token * HIDDEN + c, total.to(joined.dtype.element_ty), mask=c < HIDDEN)
