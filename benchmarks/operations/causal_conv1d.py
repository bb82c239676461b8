"""The causal convolution of one direction.

B batch, L tokens, E channels, W taps
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import WIDTHS, OpCase, draw_normal, largest_batch
from ssmpretrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference


def causal_conv1d_case(name: str, dtype: torch.dtype, *, E: int, L: int, B: int | None = None) -> OpCase:
    """Make a case of the convolution of one direction with SiLU. Channels are adjacent in memory."""
    B = B or largest_batch(E, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(draw_normal, random)
        return {"x": normal(B, L, E, dtype=dtype).mT, "weight": 0.5 * normal(E, 4), "bias": 0.1 * normal(E)}

    run, reference = (partial(conv, activation="silu") for conv in (causal_conv1d, causal_conv1d_reference))
    sizes = {"B": B, "L": L, "E": E, "W": 4}
    return OpCase(
        *("op", "causal_conv1d", f"causal_conv1d {name} L={L}", sizes, dtype, make),
        *(frozenset({"weight", "bias"}), run, reference),
        token_axis=2,
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield causal_conv1d_case("tiny", dtype, E=40, L=67, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, L in (("Ti", 6085), ("S", 197)):
        yield causal_conv1d_case(size, dtype, E=2 * WIDTHS[size], L=L)
