"""The selective scan with all inputs that a Mamba block gives it.

B batch, L tokens, E channels, N states
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import LENGTHS, WIDTHS, OpCase, draw_decay, draw_dt_bias, draw_normal, largest_batch
from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference


def selective_scan_case(name: str, dtype: torch.dtype, *, E: int, L: int, N: int = 16, B: int | None = None) -> OpCase:
    """Make a case of the scan with all inputs of a Mamba block. Channels are adjacent in memory."""
    B = B or largest_batch(E, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(draw_normal, random)
        u, delta, z = (normal(B, L, E, dtype=dtype).mT for _ in range(3))
        rows = normal(B, L, 2 * N, dtype=dtype).mT
        return {
            "u": u, "delta": delta, "A": draw_decay(random, E, N), "B": rows[:, :N], "C": rows[:, N:],
            "D": normal(E), "z": z, "delta_bias": draw_dt_bias(random, E),
        }  # fmt: skip

    parameters = frozenset({"A", "D", "delta_bias"})
    run, reference = (partial(scan, delta_softplus=True) for scan in (selective_scan, selective_scan_reference))
    sizes = {"B": B, "L": L, "E": E, "N": N}
    return OpCase(
        *("op", "selective_scan", f"selective_scan {name} L={L}", sizes, dtype, make),
        *(parameters, run, reference, B * L * E * N),
        token_axis=2,
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield selective_scan_case("tiny", dtype, E=40, L=67, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, D in WIDTHS.items():
        for L in LENGTHS:
            case = selective_scan_case(size, dtype, E=2 * D, L=L)
            yield replace(case, has_target=(size, L) in (("Ti", 197), ("Ti", 6085)))
