"""`python -m benchmarks.run --suite smoke --device cpu`: the numbers that the project stands for, as a table and JSON.

Every ratio comes from one run with both sides in turn; minima are compared, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.measure import interleaved, peak_memory

VIM, DEIT = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
LENGTHS = {197: 224, 1025: 512, 6085: 1248, 24965: 2528}  # tokens with the class token: pixels


def compare(case: str, ours: dict[str, float], theirs: dict[str, float], target: str, note: str) -> dict[str, Any]:
    """A row: how much faster (above 1) or slower (below 1) ours is, by minimum and by median."""
    return {
        "case": case, "ours": ours, "theirs": theirs, "speed_up": theirs["min_ms"] / ours["min_ms"],
        "speed_up_median": theirs["median_ms"] / ours["median_ms"], "target": target, "note": note,
    }  # fmt: skip


def scan_rows() -> Iterator[dict[str, Any]]:
    for B in (1, 8):
        for backward, target, turns in ((False, ">= 60", 10), (True, ">= 150", 5 if B == 1 else 2)):
            ours, loop = (cases.scan_inputs(B, 384, 16, 197, backward) for _ in range(2))
            expected = cases.scan("loop", loop, False)()
            error = float((cases.scan("cpu", ours, False)() - expected).norm() / expected.norm())
            assert error <= 1e-5, f"the scan is wrong by {error}; its speed does not matter"
            runs = {"cpu": cases.scan("cpu", ours, backward), "loop": cases.scan("loop", loop, backward)}
            times = interleaved(runs, turns, calls=2)
            name = f"scan forward{' + backward' if backward else ''}, batch {B}"
            yield compare(name, times["cpu"], times["loop"], target, "PyTorch loop, E384 N16 L197")


def model_rows() -> Iterator[dict[str, Any]]:
    for pixels, target, turns in ((224, ">= 0.33", 10), (1248, ">= 1.6", 2)):
        runs = {name: cases.inference(cases.model(name, pixels), pixels) for name in (VIM, DEIT)}
        times = interleaved(runs, turns)
        yield compare(f"Vim-Ti {pixels} inference", times[VIM], times[DEIT], target, "DeiT-Ti (SDPA), batch 1")
    runs = {name: cases.training_step(cases.model(name, 224), 224, 8) for name in (VIM, DEIT)}
    times = interleaved(runs, 3)
    yield compare("Vim-Ti 224 training step", times[VIM], times[DEIT], ">= 0.25", "DeiT-Ti (SDPA), batch 8, AdamW")


def memory_row(threads: int) -> dict[str, Any]:
    vim, deit = (peak_memory("train", name, "224", "8", "--threads", str(threads)) for name in (VIM, DEIT))
    return {
        "case": "Vim-Ti 224 training peak memory", "ours": vim, "theirs": deit, "target": "<= 1.3",
        "ratio": vim["peak_mib"] / deit["peak_mib"], "ratio_above_idle": vim["above_idle_mib"] / deit["above_idle_mib"],
        "note": "process peak; DeiT-Ti, batch 8, AdamW",
    }  # fmt: skip


def length_rows(threads: int) -> Iterator[dict[str, Any]]:
    """Time and memory of Vim-Ti inference over the number of tokens, and the exponents of the fitted power laws."""
    network = cases.model(VIM, 224)
    times, memory = {}, {}
    for length, pixels in LENGTHS.items():
        turns = 5 if length < 5000 else 1
        times[length] = interleaved({"vim": cases.inference(network, pixels)}, turns)["vim"]["min_ms"]
        memory[length] = peak_memory("infer", VIM, str(pixels), "1", "--threads", str(threads))["above_idle_mib"]
    for what, values in (("time (ms)", times), ("memory above idle (MiB)", memory)):
        yield {
            "case": f"Vim-Ti {what} over L", "values": values, "exponent": exponent(values), "target": "about 1",
            "exponent_last": exponent(dict(list(values.items())[-2:])), "note": f"L = {', '.join(map(str, values))}",
        }  # fmt: skip


def exponent(values: dict[int, float]) -> float:
    """Slope of the least-squares line through log(value) over log(length): 1 is linear, 2 quadratic."""
    x = [math.log(length) for length in values]
    y = [math.log(max(value, 1e-3)) for value in values.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def host(threads: int) -> dict[str, Any]:
    """Machine, versions and commit."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown")
    packages = ("torch", "triton", "timm", "numpy")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu, "threads": threads, "load": os.getloadavg()[0], "python": platform.python_version(),
        "commit": commit, "date": time.strftime("%Y-%m-%d"), **{name: version(name) for name in packages},
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person, one line each."""
    lines = [f"{'case':<38}{'ours':>11}{'theirs':>11}{'result':>18}  {'target':<10}against"]
    for row in rows:
        if "speed_up" in row:
            cells = [
                f"{row['ours']['min_ms']:.2f} ms",
                f"{row['theirs']['min_ms']:.2f} ms",
                f"{row['speed_up']:.2f}x as fast",
            ]
        elif "ratio" in row:
            cells = [
                f"{row['ours']['peak_mib']:.0f} MiB",
                f"{row['theirs']['peak_mib']:.0f} MiB",
                f"{row['ratio']:.2f}x",
            ]
        else:
            first, *_, last = row["values"].values()
            cells = [f"{first:.0f}", f"{last:.0f}", f"exponent {row['exponent']:.2f}"]
        lines.append(f"{row['case']:<38}{cells[0]:>11}{cells[1]:>11}{cells[2]:>18}  {row['target']:<10}{row['note']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["smoke"], default="smoke")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [*scan_rows(), *model_rows(), memory_row(args.threads), *length_rows(args.threads)]
    machine = host(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"schema": 1, "suite": args.suite, "host": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
