"""The decaying sum on the GPU: a program owns one sequence and BLOCK channels."""

import triton
import triton.language as tl


@triton.jit
def scan(x, log_decay, y, tokens, channels, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    first = tl.program_id(0).to(tl.int64) * tokens
    h = tl.zeros([BLOCK], tl.float32)
    for i in range(tokens):
        at = (first + (tokens - 1 - i if REVERSE else i)) * channels + channel
        h = tl.exp(tl.load(log_decay + at, mask=mask, other=0.0)) * h + tl.load(x + at, mask=mask, other=0.0)
        tl.store(y + at, h, mask=mask)
