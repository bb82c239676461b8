"""Residual sum and norm between two blocks.

B batch, L tokens, D width of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import WIDTHS, OpCase, draw_normal, largest_batch
from ssmpretrain.kernels.add_norm import add_norm, add_norm_reference


def add_norm_case(name: str, dtype: torch.dtype, *, D: int, L: int, B: int | None = None) -> OpCase:
    """Make a case of the residual sum and RMSNorm between two blocks."""
    B = B or largest_batch(D, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(draw_normal, random)
        return {"x": normal(B, L, D, dtype=dtype), "residual": normal(B, L, D), "weight": 1 + 0.1 * normal(D)}

    sizes = {"B": B, "L": L, "D": D}
    return OpCase(
        *("op", "add_norm", f"add_norm {name} L={L}", sizes, dtype, make),
        *(frozenset({"weight"}), add_norm, add_norm_reference),
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield add_norm_case("tiny", dtype, D=40, L=67, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, L in (("Ti", 6085), ("S", 197)):
        yield add_norm_case(size, dtype, D=WIDTHS[size], L=L)
