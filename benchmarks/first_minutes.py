"""`python -m benchmarks.first_minutes`: what ten minutes on a GPU should answer, in the order of worth.

1. correctness: every operation, outputs and gradients against float64, in bfloat16 and float32
2. ceilings: copy, matrix product, exponentials
3. op, block, model: times beside comparators, shares of the floors, MFU (see `benchmarks.run`)
4. training: 300 steps of masked pretraining in bfloat16: finite, images per second, memory

Each stage has a share of the time, and leaves what it does not need to the later ones. Each case runs in a process that
may hang or crash. The file is written after every case, so it is valid whenever the command is stopped. At the end the
command prints what it left out, and why. `--device cpu` runs the same at tiny sizes, which tests the command and
measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import pkgutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

import ssmpretrain
from benchmarks import ceilings, operations, report, suites
from benchmarks.case import Case, ModelCase, OpCase
from benchmarks.cases import all_cases
from benchmarks.checks import OpCheck, check_model
from benchmarks.isolated import Isolated, Lost
from benchmarks.measure import allocated, synchronize
from benchmarks.networks import flops_of, images, pretraining_step
from benchmarks.run import host
from benchmarks.suites import Row
from ssmpretrain import kernels
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.objectives import MAE, Pretraining

SHARES = {"correctness": 0.25, "ceilings": 0.05, "op": 0.2, "block": 0.05, "model": 0.25, "training": 0.2}
"""Stages in the order of worth, each with its share of the time."""

_STEPS, _WARM_UP = 300, 20  # of a training run; the first steps compile and are not timed
_SHORTEST_LIMIT_S = 20.0  # of a case
_TO_START_S = 60.0  # for the first process, which describes the machine
_STOPPED = 75  # exit code of the package: stopped with everything saved


class Stopped(Exception):
    """A signal asks the command to end."""


@dataclass(frozen=True)
class Task:
    """A case of a stage.

    run: Function of the ceilings and of a limit in seconds, which returns rows.
    identity: Entries of the row of a task that is lost.
    """

    stage: str
    name: str
    run: Callable[[dict[str, float], float], list[Row]]
    identity: Row

    @classmethod
    def of_case(cls, stage: str, case: Case, run: Callable[..., list[Row]], device: torch.device) -> Task:
        identity = suites.row(case, case.modes[0], suites.OURS) | {"suite": stage}
        return cls(stage, f"{case.name} {identity['dtype']}", partial(run, case, device), identity)


@dataclass(frozen=True)
class TrainingRun:
    """A run of masked pretraining: its encoder, the objective of it, batch and image size, and number of steps."""

    encoder: str
    build: Callable[[], Pretraining]
    sizes: dict[str, int]
    steps: int = _STEPS

    @property
    def name(self) -> str:
        return f"MAE {self.encoder}"

    @property
    def identity(self) -> Row:
        """Entries of its row that name it."""
        named = {"suite": "training", "case": self.name, "impl": suites.OURS, "mode": "training step"}
        return named | {"dtype": "bfloat16", "sizes": self.sizes, "asked_steps": self.steps}


def main(arguments: list[str] | None = None) -> int:
    """Run all stages, write the file and print the report; return the exit code."""
    args = _parse(arguments)
    start = time.monotonic()
    device = torch.device(args.device)
    torch.set_num_threads(1)  # a fork of a process with threads has none of them
    tasks, left_out = all_tasks(device, args.stages)
    result: dict[str, Any] = {
        "schema": 3, "suite": "first_minutes", "host": {}, "ceilings": {}, "rows": [], "left_out": left_out,
        "stages": {},
    }  # fmt: skip
    machine = partial(_machine, device, args.threads, args.commit)
    isolated = Isolated(partial(_set_up, args.threads), [machine, *(task.run for task in tasks)])
    waiting = deque(enumerate(tasks, start=1))
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    code = 0
    try:
        result["host"] = isolated.run(0, _TO_START_S)
        _run_stages(waiting, isolated, result, start, args)
    except Lost as reason:
        print(f"benchmarks: {reason}", file=sys.stderr)
        return 2
    except Stopped as reason:
        for _, task in waiting:
            _leave_out(result, task, str(reason))
        code = _STOPPED
    finally:
        isolated.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    _write(args.out, result)
    print(summary(result))
    print(f"written to {args.out}")
    return code or int(any(row.get("ok") is False for row in result["rows"]))


def _run_stages(
    waiting: deque[tuple[int, Task]], isolated: Isolated, result: dict[str, Any], start: float, args: argparse.Namespace
) -> None:
    """Run the waiting tasks while the time of their stages lasts, and write the file after each.

    A task leaves `waiting` when it has its rows, or when it is left out.
    """
    whole = sum(SHARES[stage] for stage in args.stages)
    shares = {stage: args.budget_s * SHARES[stage] / whole for stage in args.stages}
    ends = dict(zip(shares, accumulate(shares.values()), strict=True))
    while waiting:
        number, task = waiting[0]
        begin = time.monotonic()
        left = start + args.budget_s - begin
        if begin >= start + ends[task.stage]:
            _leave_out(result, task, f"the {task.stage} stage had no time left")
        else:
            rows = _rows(task, number, isolated, result, limit_s(shares[task.stage]), left)
            seconds = time.monotonic() - begin
            result["rows"] += [row | {"task_s": round(seconds, 3)} for row in rows]
            result["stages"][task.stage] = round(result["stages"].get(task.stage, 0.0) + seconds, 3)
            wrong = "; ".join(row["why"] for row in rows if row.get("ok") is False)
            print(f"{seconds:6.1f} s  {task.stage}: {task.name}  {wrong}", file=sys.stderr, flush=True)
        waiting.popleft()
        _write(args.out, result)


def limit_s(share_s: float) -> float:
    """Return the seconds after which a case of a stage is ended, so that two that hang cost the stage, not the rest."""
    return max(share_s / 2, _SHORTEST_LIMIT_S)


def _rows(task: Task, number: int, isolated: Isolated, result: dict[str, Any], limit: float, left: float) -> list[Row]:
    """Run a task, and return its rows; a task that is lost gives one row with the reason.

    Args:
        limit: Seconds after which the task is ended.
        left: Seconds of the whole command that are left. A task that they end has no row, and is left out.
    """
    allowed = min(limit, left)
    try:
        rows: list[Row] = isolated.run(number, allowed, result["ceilings"], allowed)
    except Lost as reason:
        if reason.took_too_long and left < limit:
            _leave_out(result, task, "the time was over while it ran")
            return []
        return [task.identity | {"ok": False, "why": str(reason)}]
    if task.stage == "ceilings":
        (result["ceilings"],) = rows
        return []
    return rows


def _leave_out(result: dict[str, Any], task: Task, why: str) -> None:
    result["left_out"].append({"stage": task.stage, "case": task.name, "why": why})


# Tasks


def all_tasks(device: torch.device, stages: Sequence[str]) -> tuple[list[Task], list[dict[str, str]]]:
    """Return the tasks of some stages in the order of worth, and what is left out whatever the time."""
    tiny = device.type == "cpu"
    tasks = [Task("ceilings", "ceilings", lambda *_: [ceilings.measure(device)], {"suite": "ceilings", "case": "all"})]
    left_out = []
    measured = all_cases({"op", "block", "model"}, [torch.bfloat16], tiny)
    small = [*all_cases({"op", "block"}, [torch.bfloat16, torch.float32], tiny=True), *checked_models(torch.bfloat16)]
    tasks += [Task.of_case("correctness", case, _check, device) for case in small]
    tasks += [Task.of_case(case.suite, case, _time, device) for case in measured]
    registered = set(ssmpretrain.list_encoders())
    for run in training_runs(tiny):
        if run.encoder in registered:
            tasks.append(Task("training", run.name, partial(_train, run, device), run.identity))
        else:
            why = f"{run.encoder} is no registered encoder"
            left_out.append({"stage": "training", "case": run.name, "why": why})
    left_out += [
        {"stage": "correctness", "case": name, "why": "benchmarks/operations has no case of this kernel"}
        for name in kernels_without_case()
    ]
    order = list(SHARES)
    tasks.sort(key=lambda task: order.index(task.stage))
    return [task for task in tasks if task.stage in stages], [one for one in left_out if one["stage"] in stages]


def kernels_without_case() -> list[str]:
    """Return the operations of the package that no module of `benchmarks.operations` measures."""
    measured = [importlib.import_module(f"{operations.__name__}.{found.name}") for found in _modules_of(operations)]
    sources = {getattr(value, "__module__", "") for module in measured for value in vars(module).values()}
    names = [f"{kernels.__name__}.{found.name}" for found in _modules_of(kernels) if found.ispkg]
    with_api = [name for name in names if importlib.util.find_spec(f"{name}.api")]
    return [name.split(".")[-1] for name in with_api if not any(one.startswith(f"{name}.") for one in sources)]


def _modules_of(package: ModuleType) -> list[pkgutil.ModuleInfo]:
    return list(pkgutil.iter_modules(package.__path__))


def checked_models(dtype: torch.dtype) -> list[ModelCase]:
    """Return a small encoder of each family, to be checked and not to be timed."""
    names = ssmpretrain.list_encoders("test_*")
    return [ModelCase(name, name, "", False, {"px": 64, "B": 1}, dtype) for name in names]


def training_runs(tiny: bool) -> list[TrainingRun]:
    """Return the runs of masked pretraining, also those of encoders that are not registered."""

    def run(encoder: str, mask_ratio: float, **settings: Any) -> TrainingRun:
        sizes, steps = ({"px": 64, "B": 2}, 4) if tiny else ({"px": 224, "B": 256}, _STEPS)
        if tiny:
            settings |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        return TrainingRun(encoder, lambda: MAE(encoder, mask_ratio=mask_ratio, **settings), sizes, steps)

    vim, vmamba, vim2 = ("test_vim", "test_vmamba", "test_vim2")
    if not tiny:
        vim, vmamba, vim2 = ("vim_base_patch16_224", "vmamba_tiny_s1l8", "vim2_small_patch16_224")
    return [run(vim, 0.75), run(vmamba, 0.6, decoder="vit"), run(vim2, 0.75)]


def _check(case: Case, device: torch.device, _: dict[str, float], __: float) -> list[Row]:
    """Compare a case with the truth, and return a row."""
    if isinstance(case, OpCase):
        random = torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))
        check = OpCheck(case, random).of(case.run)
    else:
        check = check_model(case, device)
    return [suites.row(case, "check", suites.OURS) | suites.checked(check) | {"suite": "correctness"}]


def _time(case: Case, device: torch.device, best: dict[str, float], _: float) -> list[Row]:
    return suites.rows(case, device, best, None)


def _train(run: TrainingRun, device: torch.device, best: dict[str, float], limit_s: float) -> list[Row]:
    """Train for the steps of a run, or until four fifths of the limit are over, and return a row."""
    end = time.monotonic() + 0.8 * limit_s
    before = allocated(device)
    batches = [images(run.sizes["B"], run.sizes["px"], device) for _ in range(2)]
    step = pretraining_step(run.build().to(device), batches, torch.bfloat16)
    work = flops_of(step)
    losses, begin = [step()], time.monotonic()
    for number in range(2, run.steps):
        if number == _WARM_UP:
            synchronize(device)
            begin = time.monotonic()
        losses.append(step())
        if number % 10 == 0:
            synchronize(device)
            if time.monotonic() > end:
                break
    synchronize(device)
    timed = len(losses) - (_WARM_UP - 1 if len(losses) >= _WARM_UP else 1)
    seconds = (time.monotonic() - begin) / timed
    ok = bool(torch.stack(losses).isfinite().all())
    row: Row = run.identity | {
        "ok": ok, "steps": len(losses) + 1, "loss": [float(losses[0]), float(losses[-1])],
        "achieved": {"images_s": run.sizes["B"] / seconds}, "work": {"flops": work},
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    if best:
        row["achieved"]["mfu"] = work / seconds / (best["gemm_TFs"] * 1e12)
    return [row if ok else row | {"why": "a loss is not finite"}]


# The process of the cases, and the command


def _machine(device: torch.device, threads: int, commit: str | None, *_: Any) -> dict[str, Any]:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a CUDA GPU; PyTorch sees none. Use --device cpu.")
    return host(device, threads, commit)


def _set_up(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on both sides


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def _write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_json(file, result)


def summary(result: dict[str, Any]) -> str:
    """Format the report: correctness, times, training, and what was left out."""
    by_stage: dict[str, list[Row]] = {}
    for row in result["rows"]:
        by_stage.setdefault(row["suite"], []).append(row)
    checks = by_stage.get("correctness", [])
    lines = [f"correctness: {sum(row['ok'] for row in checks)} of {len(checks)} right"]
    lines += [f"  LOST ceilings: {row['why']}" for row in by_stage.get("ceilings", [])]
    lines += [f"  WRONG {row['case']} {row.get('dtype', '')}: {row['why']}" for row in checks if not row["ok"]]
    lines += [
        f"  NOT DETERMINISTIC {row['case']} {row['dtype']}" for row in checks if row.get("deterministic") is False
    ]
    timed = [row for stage in ("op", "block", "model") for row in by_stage.get(stage, [])]
    if timed:
        lines.append(report.table({"ceilings": result["ceilings"], "rows": timed, "skipped": []}))
    lines += [_training_line(row) for row in by_stage.get("training", [])]
    absent = dict.fromkeys(f"{row['impl']}: {row['absent']}" for row in timed if "absent" in row)
    lines += [f"took no part: {one:.160}" for one in absent]
    reasons: dict[str, list[str]] = {}
    for one in result["left_out"]:
        reasons.setdefault(one["why"], []).append(one["case"])
    lines += [f"left out, {why}: {', '.join(cases):.400}" for why, cases in reasons.items()]
    return "\n".join(lines if reasons else [*lines, "nothing was left out"])


def _training_line(row: Row) -> str:
    if "loss" not in row:
        return f"training {row['case']}: {row['why']}"
    first, last = row["loss"]
    cells = [f"{row['steps']} of {row['asked_steps']} steps", f"{row['achieved']['images_s']:.0f} images/s"]
    if "mfu" in row["achieved"]:
        cells.append(f"MFU {100 * row['achieved']['mfu']:.0f}%")
    if "peak_bytes" in row:
        cells.append(f"{row['peak_bytes'] / 2**30:.1f} GiB")
    state = "" if row["ok"] else "  NOT FINITE"
    where = f"training {row['case']} bf16, batch {row['sizes']['B']}"
    return f"{where}: {', '.join(cells)}, loss {first:.3f} to {last:.3f}{state}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=540, help="seconds of the whole command")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--stages", default=",".join(SHARES), help="some of the stages, with commas between them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", help="what git describes, for a copy without .git")
    parser.add_argument("--out", type=Path, default=Path("first_minutes.json"))
    args = parser.parse_args(arguments)
    chosen = args.stages.split(",")
    if not set(chosen) <= set(SHARES):
        parser.error(f"--stages takes {', '.join(SHARES)}, with commas between them; got {args.stages}")
    args.stages = [stage for stage in SHARES if stage in chosen]
    return args


if __name__ == "__main__":
    sys.exit(main())
