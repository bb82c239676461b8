"""Measurement of time and memory, made so that a busy machine distorts ratios as little as possible."""

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
FEWEST_TURNS = 5  # if 20 would take too long; the row records the number


def interleaved(runs: dict[str, Callable[[], Any]], turns: int, calls: int = 1) -> dict[str, dict[str, float]]:
    """Time several functions in turn (A B A B ...), so that a slow minute affects all of them.

    Args:
        runs: Functions to time, by name.
        turns: Turns of each function.
        calls: Timed calls in a row per turn. One more call before them is not timed; it fills the caches with the data
            of this function.

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
    """Time several functions in turn on a device. The first function runs once more at the end of every turn.

    Args:
        device: Device of the functions. CUDA events time a GPU, the clock times a CPU.
        runs: Functions to time, by name. Each is called WARM_UPS times, and then TURNS times. If this would take longer
            than `limit_s`, there are fewer turns, but at least FEWEST_TURNS.
        limit_s: Seconds for all turns.

    Returns:
        For each name "median", "min" and "iqr" (distance of the quartiles) in milliseconds, and "n", the number of
        turns. The first name also has "repeat_median", the median of its second calls; the difference of both medians
        is noise. The second dictionary holds the reasons of functions that failed, by name. A failure of the first
        function is raised.
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
    """Measure the highest memory allocated on a GPU during `run`, in bytes above `before`; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(device: torch.device, run: Callable[[], Any]) -> float:
    """Call `run` WARM_UPS times, and return the seconds of the last call."""
    for _ in range(WARM_UPS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
    return time.perf_counter() - start


def _timed(device: torch.device, run: Callable[[], Any]) -> Callable[[], float]:
    """Call `run`, and return a function that reads the milliseconds after the device is synchronized."""
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
        "peak_mib": highest resident memory of the process, in MiB; "above_idle_mib": the same above the memory before
        the work began, with libraries imported and the model built.
    """
    command = [sys.executable, "-m", "benchmarks.memory_case", case, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def resident_mib() -> float:
    """Return the present memory of this process, in MiB (Linux)."""
    return _status("VmRSS")


def peak_resident_mib() -> float:
    """Return the highest memory of this process so far, in MiB (Linux).

    `getrusage` is not used, because ru_maxrss of a child begins with the memory of its parent.
    """
    return _status("VmHWM")


def _status(field: str) -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024
