"""The core of VMamba's SS2D.

B batch, E channels, N states, R rank of the step size, K routes, H x W map
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import STAGES, OpCase, draw_decay, draw_dt_bias, draw_normal, draw_projection, largest_batch
from ssmpretrain.kernels.cross_scan import cross_selective_scan, cross_selective_scan_reference


def cross_selective_scan_case(
    name: str, dtype: torch.dtype, *, E: int, H: int, R: int, N: int, B: int | None = None
) -> OpCase:
    """Make a case of the core of VMamba's SS2D on a square map. Channels are adjacent in memory."""
    K = 4
    B = B or largest_batch(E, H * H, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal, projection = partial(draw_normal, random), partial(draw_projection, random, dtype)
        return {
            "x": normal(B, H, H, E, dtype=dtype).permute(0, 3, 1, 2), "x_proj": projection(K, R + 2 * N, E),
            "dt_proj": projection(K, E, R), "dt_bias": draw_dt_bias(random, K, E), "A": draw_decay(random, K, E, N),
            "D": normal(K, E),
        }  # fmt: skip

    parameters = frozenset({"x_proj", "dt_proj", "dt_bias", "A", "D"})
    sizes = {"B": B, "H": H, "W": H, "E": E, "N": N, "R": R, "K": K}
    return OpCase(
        *("op", "cross_selective_scan", f"cross_selective_scan {name}", sizes, dtype, make),
        *(parameters, cross_selective_scan, cross_selective_scan_reference, K * B * H * H * E * N),
        token_axis=2,
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield cross_selective_scan_case("tiny", dtype, E=40, H=7, R=5, N=1, B=3)
    yield cross_selective_scan_case("tiny, N = 16", dtype, E=40, H=7, R=5, N=16, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for stage, (E, H) in STAGES.items():
        case = cross_selective_scan_case(f"VMamba-T stage {stage}", dtype, E=E, H=H, R=E // 16, N=1)
        yield replace(case, has_target=stage == 1)
    yield cross_selective_scan_case("VMamba-T v0 stage 3", dtype, E=768, H=14, R=24, N=16)
