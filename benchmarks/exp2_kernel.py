"""A kernel that computes only exponentials, to measure how many a GPU computes per second."""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def exp2_chain(x, y, STEPS, BLOCK: tl.constexpr):
    """Apply x -> 2^-x STEPS times. Values stay in (0, 1]. Each step is one exponential; the sign costs nothing."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    for _ in range(STEPS):
        value = tl.exp2(-value)
    tl.store(y + offsets, value)
