"""Start a Triton kernel, or record the launch instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and warps, which decide what is compiled and how often it runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, **arguments: Any) -> None:
    """Run a kernel on the device of its tensors; inside `record_launches`, only record the launch."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Record launches instead of running them, so that tensors may be on the meta device. Not safe with threads."""
    global _recorded
    launches: list[Launch] = []
    _recorded = launches
    try:
        yield launches
    finally:
        _recorded = None
