"""Time and memory, measured so that a noisy machine distorts a ratio as little as possible."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

WARM_UPS = 3
TURNS = 20
FEWEST_TURNS = 5  # where 20 would take too long; the row says how many


def interleaved(runs: dict[str, Callable[[], Any]], turns: int, calls: int = 1) -> dict[str, dict[str, float]]:
    """Time several functions in turn (A B A B ...), so that a slow minute hits all of them.

    Args:
        runs: What to time, by name.
        turns: Turns of each.
        calls: Timed calls in a row per turn, after one that is not timed: the caches hold what the function needs, and
            not what its rival left there.

    Returns:
        For each name: "min_ms", "median_ms" and "calls" over all turns.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            run()
            for _ in range(calls):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
        gc.collect()
    return {name: {"min_ms": min(t), "median_ms": median(t), "calls": len(t)} for name, t in times.items()}


def side_by_side(
    device: torch.device, runs: dict[str, Callable[[], Any]], limit_s: float = 20.0
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time several functions in turn on a device, the first of them once more at the end of every turn.

    Args:
        device: Where they run: CUDA events time a GPU, the clock a CPU.
        runs: What to time, by name. Called WARM_UPS times, then TURNS times, or fewer but at least FEWEST_TURNS where
            all of it would take longer than `limit_s`.
        limit_s: Seconds for all turns.

    Returns:
        For each name "median", "min" and "iqr" (distance of the quartiles) in milliseconds and "n", the turns, and for
        the first also "repeat_median", of its second call in every turn: what the two differ by is noise. And the
        reason of each that failed to run, by name; the first one's failure is raised.
    """
    first = next(iter(runs))
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, run in runs.items():
        try:
            seconds[name] = _warm_up(device, run)
        except RuntimeError as reason:  # out of memory, or no kernel for this shape
            if name == first:
                raise
            failed[name] = first_line(reason)
    turns = max(FEWEST_TURNS, min(TURNS, int(limit_s / (sum(seconds.values()) + seconds[first]))))
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in seconds}
    again: list[Callable[[], float]] = []
    for _ in range(turns):
        for name in seconds:
            readings[name].append(_timed(device, runs[name]))
        again.append(_timed(device, runs[first]))
    synchronize(device)
    times = {name: _summary([read() for read in reads]) for name, reads in readings.items()}
    times[first]["repeat_median"] = median(read() for read in again)
    return times, failed


def peak_device_memory(device: torch.device, run: Callable[[], Any], before: int) -> int | None:
    """Highest memory allocated on a GPU while `run` runs, in bytes, above `before`; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds of the last of WARM_UPS calls."""
    for _ in range(WARM_UPS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
    return time.perf_counter() - start


def _timed(device: torch.device, run: Callable[[], Any]) -> Callable[[], float]:
    """Call, and return what reads off the milliseconds once the device is synchronized."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        return lambda: float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    milliseconds = (time.perf_counter() - start) * 1e3
    return lambda: milliseconds


def _summary(times: list[float]) -> dict[str, float]:
    low, _, high = quantiles(times, n=4, method="inclusive")
    return {"median": median(times), "min": min(times), "iqr": high - low, "n": len(times)}


def peak_memory(case: str, *arguments: str) -> dict[str, float]:
    """Run a case of `benchmarks.memory_case` in a process of its own.

    Returns:
        "peak_mib": highest resident memory of the process; "above_idle_mib": the same above what it held before the
        work began (libraries imported, model built).
    """
    command = [sys.executable, "-m", "benchmarks.memory_case", case, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def resident_mib() -> float:
    """Memory of this process now, in MiB (Linux)."""
    return _status("VmRSS")


def peak_resident_mib() -> float:
    """Highest memory of this process so far, in MiB (Linux).

    Not `getrusage`: its ru_maxrss of a child begins at the memory of the parent that started it.
    """
    return _status("VmHWM")


def _status(field: str) -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024
