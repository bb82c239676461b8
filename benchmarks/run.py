"""`python -m benchmarks.run --suite smoke --device cpu`: run a suite of benchmarks, print a table and write JSON.

`--suite data` measures the cost of streaming from shards, compared with decoding and augmenting alone, and the cost of
several views of an image.
`--suite encoders` measures encoders beside timm's on a CPU, at `--pixels` and in every `--dtype`; `--compile` adds all
of them under `torch.compile`.
`--suite dense` measures time and memory of the maps of one image of 512 to 2048 pixels, on a CPU or a GPU.
`--suite joint_embedding` measures a step of DINO, iBOT and LeJEPA beside one of MAE, on a CPU or a GPU.
`--suite op`, `block`, `model` or `all` with `--device cuda` measures the kernels and encoders on a GPU, side by side
with comparators; on a CPU the same suites run tiny sizes, which tests the benchmark and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, comparators, dense, encoders, joint_embedding, report, smoke, suites
from benchmarks.cases import all_cases
from ssmpretrain.base.whole_files import replace_json

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """Run the suite that the command line, or `arguments`, names, and return the exit code."""
    args = parse(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda needs a CUDA GPU; PyTorch sees none. Use --device cpu.", file=sys.stderr)
        return 2
    if device.type == "cuda" and args.suite in ("smoke", "data", "encoders"):
        print(
            f"benchmarks: the {args.suite} suite measures the CPU; got --device cuda. Use --suite all.", file=sys.stderr
        )
        return 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = host(device, args.threads, args.commit)
    if args.suite in ("dense", "joint_embedding"):
        suite = dense if args.suite == "dense" else joint_embedding
        rows = suite.rows(device, args.threads)
        write(args.out, {"schema": 1, "suite": args.suite, "host": machine, "rows": rows})
        table, failed = suite.table(rows), False
    elif args.suite == "encoders":
        dtypes = [DTYPES[name] for name in args.dtype.split(",")]
        rows = []
        for row in encoders.rows(args.threads, dtypes, [int(px) for px in args.pixels.split(",")], args.compile):
            rows.append(row)
            print(encoders.table([row]), file=sys.stderr, flush=True)
            write(args.out, {"schema": 1, "suite": args.suite, "host": machine, "rows": rows})
        table, failed = encoders.table(rows), False
    elif args.suite in ("smoke", "data"):
        from benchmarks import data

        rows = smoke.rows(args.threads) if args.suite == "smoke" else data.rows()
        write(args.out, {"schema": 1, "suite": args.suite, "host": machine, "rows": rows})
        table, failed = (smoke if args.suite == "smoke" else data).table(rows), False
    else:
        result = run_suites(args, device)
        write(args.out, {"schema": 2, "suite": args.suite, "host": machine, **result})
        table, failed = report.table(result), any(row.get("ok") is False for row in result["rows"])
    print(table)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"written to {args.out}")
    return 1 if failed else 0


def run_suites(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the ceilings, and then case by case until the time is over."""
    stop = time.monotonic() + args.budget_s
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on both sides
    best = ceilings.measure(device)
    chosen = {"op", "block", "model"} if args.suite == "all" else {args.suite}
    cases = all_cases(chosen, [DTYPES[name] for name in args.dtype.split(",")], tiny=device.type == "cpu")
    vs = None if args.vs is None else set(args.vs.split(","))
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    longest = 0.0
    for case in cases:
        start = time.monotonic()
        if start + longest > stop:
            skipped.append(f"{case.name} {case.dtype}")
            continue
        rows += suites.rows(case, device, best, vs)
        longest = max(longest, time.monotonic() - start)
        print(f"{time.monotonic() - start:6.1f} s  {case.name} {case.dtype}", file=sys.stderr, flush=True)
    return {"ceilings": best, "rows": rows, "skipped": skipped}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite",
        choices=["smoke", "encoders", "data", "dense", "joint_embedding", "op", "block", "model", "all"],
        default="smoke",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds; start no case that may end later")
    parser.add_argument(
        "--dtype", default="bf16", help="of activations: bf16, fp32 or both; suite model takes the first"
    )
    parser.add_argument(
        "--pixels", default=",".join(map(str, encoders.PIXELS)), help="sides of images of --suite encoders"
    )
    parser.add_argument("--compile", action="store_true", help="time compiled encoders too, in --suite encoders")
    parser.add_argument("--vs", help="comparators by name, such as torch_ref,mamba,deit; all of them by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", help="what git describes, for a copy without .git")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args(arguments)
    for option, known in (("dtype", tuple(DTYPES)), ("vs", comparators.FAMILIES)):
        given = getattr(args, option)
        if given is not None and not set(given.split(",")) <= set(known):
            parser.error(f"--{option} takes {', '.join(known)}, with commas between them; got {given}")
    return args


def host(device: torch.device, threads: int, commit: str | None) -> dict[str, Any]:
    """Describe the machine, the versions and the commit."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown")
    machine = {
        "cpu": cpu, "threads": threads, "load": os.getloadavg()[0], "python": platform.python_version(),
        "commit": commit or _output("git", "describe", "--always", "--dirty"), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, **{name: comparators.package_version(name) for name in ("triton", "timm", "numpy")},
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        machine |= {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "gpu_gib": round(properties.total_memory / 2**30, 1), "driver": driver, "cuda": torch.version.cuda,
            "mamba-ssm": comparators.package_version("mamba-ssm"),
            "causal-conv1d": comparators.package_version("causal-conv1d"),
        }  # fmt: skip
    return machine


def write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_json(file, result)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
