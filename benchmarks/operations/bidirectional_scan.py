"""The core of Vim's mixer.

B batch, L tokens, E channels, N states, R rank of the step size
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import (
    LENGTHS,
    WIDTHS,
    Function,
    OpCase,
    draw_decay,
    draw_dt_bias,
    draw_normal,
    draw_projection,
    largest_batch,
)
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan, bidirectional_scan_reference


def bidirectional_scan_case(
    name: str, dtype: torch.dtype, *, E: int, R: int, L: int, N: int = 16, B: int | None = None
) -> OpCase:
    """Make a case of the core of Vim's mixer, with both directions."""
    B = B or largest_batch(E, L, dtype)
    names = [f"{which}_{name}" for which in ("forward", "backward") for name in ScanDirection._fields]

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal, projection = partial(draw_normal, random), partial(draw_projection, random, dtype)

        def direction() -> ScanDirection:
            return ScanDirection(
                *(0.5 * normal(E, 4), 0.1 * normal(E), projection(R + 2 * N, E), projection(E, R)),
                *(draw_dt_bias(random, E), draw_decay(random, E, N), normal(E)),
            )

        inputs = {"xz": normal(B, L, 2 * E, dtype=dtype)}
        return inputs | dict(zip(names, [*direction(), *direction()], strict=True))

    def of_named(function: Function) -> Function:
        def run(xz: Tensor, **named: Tensor) -> Tensor:
            ordered = [named[name] for name in names]
            result: Tensor = function(xz, ScanDirection(*ordered[:7]), ScanDirection(*ordered[7:]))
            return result

        return run

    run, reference = of_named(bidirectional_scan), of_named(bidirectional_scan_reference)
    sizes = {"B": B, "L": L, "E": E, "N": N, "R": R}
    return OpCase(
        *("op", "bidirectional_scan", f"bidirectional_scan {name} L={L}", sizes, dtype, make),
        *(frozenset(names), run, reference, 2 * B * L * E * N),
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield bidirectional_scan_case("tiny", dtype, E=40, R=5, L=67, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, D in WIDTHS.items():
        for L in LENGTHS:
            yield bidirectional_scan_case(size, dtype, E=2 * D, R=D // 16, L=L)
