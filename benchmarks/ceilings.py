"""Ceilings: the best speed of the machine, measured in the same run as the results that are compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import side_by_side


def measure(device: torch.device) -> dict[str, float]:
    """Measure copy bandwidth, matrix products and exponentials.

    Returns:
        "copy_TBs": bytes read plus bytes written per second, in 1e12; "gemm_TFs": bf16 matrix product of random
        numbers, in 1e12 FLOP per second; "exp2_Ts": exponentials per second, in 1e12; "seconds": duration of the
        measurement. On a CPU the sizes are small, and the numbers have no meaning.
    """
    start = time.perf_counter()
    gpu = device.type == "cuda"
    rates = {
        "copy_TBs": _copy(device, 2**31 if gpu else 2**22) / 1e12,
        "gemm_TFs": _gemm(device, 8192 if gpu else 128) / 1e12,
        "exp2_Ts": (_gpu_exp2(device) if gpu else _cpu_exp2(device)) / 1e12,
    }
    return {**rates, "seconds": time.perf_counter() - start}


def _copy(device: torch.device, size: int) -> float:
    """Measure the bytes read and written per second by a copy of `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(device, lambda: target.copy_(source))


def _gemm(device: torch.device, n: int) -> float:
    """Measure the FLOP per second of an n x n x n product."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _seconds(device, lambda: a @ b)


def _gpu_exp2(device: torch.device) -> float:
    """Measure the exponentials per second of a kernel that computes nothing else."""
    from benchmarks.exp2_kernel import BLOCK, exp2_chain  # imports Triton, which needs a GPU

    programs, steps = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 1024
    x = torch.rand(programs * BLOCK, device=device)
    y = torch.empty_like(x)

    def run() -> None:
        exp2_chain[(programs,)](x, y, steps, BLOCK=BLOCK, num_warps=4)

    return x.numel() * steps / _seconds(device, run)


def _cpu_exp2(device: torch.device) -> float:
    x = torch.rand(2**18)
    return x.numel() / _seconds(device, lambda: torch.exp2(x))


def _seconds(device: torch.device, run: Callable[[], Any]) -> float:
    return side_by_side(device, {"ceiling": run})[0]["ceiling"]["median"] * 1e-3
