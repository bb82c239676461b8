"""The scan of Mamba-2 in both directions, as vim2's mixer calls it.

B batch, L tokens, E channels = H heads of P channels, G groups of heads, N state
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import LENGTHS, WIDTHS, OpCase, draw_dt_bias, draw_normal, largest_batch
from ssmpretrain.kernels.ssd import bidirectional_ssd

_PARAMETERS = frozenset({"A", "D", "A_backward"})


def ssd_case(
    name: str, dtype: torch.dtype, *, H: int, L: int, P: int = 64, N: int = 64, G: int = 1, B: int | None = None
) -> OpCase:
    """Make a case of both directions. x, B and C are slices of one tensor, as the convolution leaves them."""
    B = B or largest_batch(H * P, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(draw_normal, random)
        x, rows_b, rows_c = normal(B, L, H * P + 2 * G * N, dtype=dtype).split((H * P, G * N, G * N), dim=-1)

        def step() -> Tensor:
            return F.softplus(normal(B, L, H) + draw_dt_bias(random, H))

        def decay() -> Tensor:  # Mamba-2 starts with -1 to -16
            return -1.0 - 15.0 * torch.rand(H, generator=random, device=random.device)

        return {
            "x": x.unflatten(-1, (H, P)),
            "dt": step(),
            "A": decay(),
            "B": rows_b.unflatten(-1, (G, N)),
            "C": rows_c.unflatten(-1, (G, N)),
            "D": normal(H),
            "dt_backward": step(),
            "A_backward": decay(),
        }

    reference = partial(bidirectional_ssd, impl="reference")
    sizes = {"B": B, "L": L, "E": H * P, "H": H, "P": P, "G": G, "N": N}
    return OpCase(
        *("op", "ssd", f"ssd {name} L={L}", sizes, dtype, make),
        *(_PARAMETERS, bidirectional_ssd, reference),
        cancelling=frozenset({"A", "A_backward"}),
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield ssd_case("tiny", dtype, H=4, L=67, P=16, N=8, G=2, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, D in WIDTHS.items():
        for L in LENGTHS:
            yield ssd_case(size, dtype, H=2 * D // 64, L=L)
