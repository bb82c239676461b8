"""The gated norm of a Mamba-2 mixer.

B batch, L tokens, E channels
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import WIDTHS, OpCase, draw_normal, largest_batch
from ssmpretrain.kernels.gated_norm import gated_rms_norm, gated_rms_norm_reference


def gated_norm_case(name: str, dtype: torch.dtype, *, E: int, L: int, G: int = 1, B: int | None = None) -> OpCase:
    """Make a case of gate, RMSNorm over each of G groups and scale."""
    B = B or largest_batch(E, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(draw_normal, random)
        x, z = (normal(B, L, E, dtype=dtype) for _ in range(2))
        return {"x": x, "z": z, "weight": 1 + 0.1 * normal(E)}

    run, reference = (partial(norm, groups=G) for norm in (gated_rms_norm, gated_rms_norm_reference))
    sizes = {"B": B, "L": L, "E": E, "G": G}
    return OpCase(
        *("op", "gated_norm", f"gated_norm {name} L={L}", sizes, dtype, make),
        *(frozenset({"weight"}), run, reference),
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield gated_norm_case("tiny", dtype, E=40, L=67, G=2, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, L in (("Ti", 6085), ("S", 197)):
        yield gated_norm_case(size, dtype, E=2 * WIDTHS[size], L=L)
