"""Time and memory, measured so that a noisy machine distorts a ratio as little as possible."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any


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
