"""`benchmarks.first_minutes` on a CPU: every stage, and what hangs, crashes, is stopped or has no time."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import bare_process

from benchmarks import first_minutes, measure
from benchmarks.case import Case, ModelCase
from benchmarks.cases import all_cases
from benchmarks.first_minutes import Task, main
from benchmarks.suites import OURS, Row

# What the image of the GPU machine that we know lacks of this package's requirements, and what those bring along.
MISSING = ["open_clip", "open_clip_torch", "ftfy", "webdataset", "jsonargparse", "docstring_parser", "typeshed_client"]
MISSING += ["pycocotools", "faster_coco_eval", "moto", "flask", "datasets", "s3fs"]


def run(file: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["--device", "cpu", "--threads", "1", "--out", str(file), *words])
    return code, json.loads(file.read_text())


def test_every_stage_runs_at_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few_cases(suites: set[str], dtypes: list[torch.dtype], tiny: bool) -> list[Case]:
        operations = [case for case in all_cases(suites & {"op"}, dtypes[:1], tiny) if case.op == "add_norm"]
        small = ModelCase("test_vim", "test_vim", "test_vit", False, {"px": 32, "B": 1}, dtypes[0])
        return [*operations, *([small] if "model" in suites else [])]

    monkeypatch.setattr(measure, "TURNS", measure.FEWEST_TURNS)
    monkeypatch.setattr(first_minutes, "all_cases", few_cases)
    monkeypatch.setattr(first_minutes, "checked_models", lambda _: [])
    code, result = run(tmp_path / "result.json")
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert result["host"]["torch"] == torch.__version__ and result["ceilings"]["gemm_TFs"] > 0
    found = {(row["suite"], row["case"], row["impl"], row["mode"]): row for row in result["rows"]}
    assert found["correctness", "add_norm tiny L=67", OURS, "check"]["ok"]
    timed = found["op", "add_norm tiny L=67", OURS, "forward"]
    assert timed["ms"]["median"] > 0 and timed["achieved"]["pct_floor"] > 0
    model, rival = (found["model", "test_vim", name, "inference"] for name in (OURS, "test_vit"))
    assert 0 < model["achieved"]["mfu"] < 1 and rival["achieved"]["mfu"] > 0
    trained = found["model", "test_vim", OURS, "training step"]
    assert 2 < trained["work"]["flops"] / model["work"]["flops"] < 4  # the backward pass has about twice as many
    for name in ("test_vim", "test_vmamba"):
        training = found["training", f"MAE {name}", OURS, "training step"]
        assert training["ok"] and training["steps"] == training["asked_steps"] == 4
        assert training["achieved"]["images_s"] > 0
        assert f"training MAE {name} bf16, batch 2: 4 of 4 steps" in printed
    assert list(result["stages"]) == ["correctness", "ceilings", "op", "model", "training"]
    assert "correctness: 1 of 1 right" in printed and "took no part: mamba: mamba-ssm cannot be imported" in printed


def test_every_operation_and_every_kernel_is_checked() -> None:
    tasks, left_out = first_minutes.all_tasks(torch.device("cpu"), ["correctness"])
    names = [task.name for task in tasks]
    for operation in ("add_norm", "bidirectional_scan", "causal_conv1d", "cross_selective_scan", "gated_norm", "ssd"):
        for dtype in ("bfloat16", "float32"):
            assert any(name.startswith(operation) and name.endswith(dtype) for name in names), operation
    assert {"test_vim bfloat16", "test_vmamba bfloat16"} <= set(names)
    assert left_out == []


def test_a_kernel_without_a_case_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = first_minutes._modules_of

    def without_add_norm(package: Any) -> Any:
        return [found for found in real(package) if package.__name__ != "benchmarks.operations" or found.name == "ssd"]

    monkeypatch.setattr(first_minutes, "_modules_of", without_add_norm)
    assert "add_norm" in first_minutes.kernels_without_case() and "ssd" not in first_minutes.kernels_without_case()


def tasks_of(**runs: Callable[..., list[Row]]) -> Callable[..., tuple[list[Task], list[dict[str, str]]]]:
    identity = {"suite": "correctness", "impl": OURS, "dtype": "bfloat16", "mode": "check"}
    tasks = [Task("correctness", name, function, identity | {"case": name}) for name, function in runs.items()]
    return lambda *_: (tasks, [])


def right(*_: Any) -> list[Row]:
    return [{"suite": "correctness", "case": "right", "impl": OURS, "dtype": "bfloat16", "ok": True}]


def raises(*_: Any) -> list[Row]:
    raise torch.OutOfMemoryError("CUDA out of memory\nmore")


def crashes(*_: Any) -> list[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def hangs(*_: Any) -> list[Row]:
    time.sleep(60)
    return []


def test_what_raises_crashes_or_hangs_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_minutes, "limit_s", lambda _: 1.0)
    tasks = tasks_of(raises=raises, first=right, crashes=crashes, second=right, hangs=hangs)
    monkeypatch.setattr(first_minutes, "all_tasks", tasks)
    code, result = run(tmp_path / "result.json")
    assert code == 1
    assert [(row["case"], row.get("why")) for row in result["rows"]] == [
        ("raises", "OutOfMemoryError: CUDA out of memory"),
        ("right", None),
        ("crashes", "its process ended with code -9"),
        ("right", None),
        ("hangs", "stopped after 1 s"),
    ]
    printed = capsys.readouterr().out
    assert "correctness: 2 of 5 right" in printed and "WRONG hangs bfloat16: stopped after" in printed
    assert "nothing was left out" in printed


def test_without_time_the_cases_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_minutes, "all_tasks", tasks_of(one=right, other=right))
    code, result = run(tmp_path / "result.json", "--budget-s", "0")
    assert code == 0 and result["rows"] == [] and [one["case"] for one in result["left_out"]] == ["one", "other"]
    assert "left out, the correctness stage had no time left: one, other" in capsys.readouterr().out


def test_a_signal_leaves_a_whole_file_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = os.getpid()

    def stops(*_: Any) -> list[Row]:
        os.kill(parent, signal.SIGTERM)
        return hangs()

    monkeypatch.setattr(first_minutes, "all_tasks", tasks_of(one=right, other=stops, third=right))
    before = signal.getsignal(signal.SIGTERM)
    code, result = run(tmp_path / "result.json")
    assert code == 75 and len(result["rows"]) == 1 and signal.getsignal(signal.SIGTERM) == before
    assert [(one["case"], one["why"]) for one in result["left_out"]] == [
        ("other", "stopped by SIGTERM"),
        ("third", "stopped by SIGTERM"),
    ]
    assert "left out, stopped by SIGTERM: other, third" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--out", str(tmp_path / "result.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("--device cuda needs a CUDA GPU; PyTorch sees none. Use --device cpu.")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_a_bare_gpu_image_suffices(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--threads", "1", "--out", tmp_path / "result.json", "--stages", "correctness,training"]
    for module, more in (
        ("benchmarks.first_minutes", words),
        ("benchmarks.run", ["--suite", "op", "--budget-s", "0", "--out", tmp_path / "bench.json"]),
        ("pytest", ["-m", "gpu", "tests/kernels", "--collect-only", "-q", "-p", "no:cacheprovider"]),
    ):
        done = bare_process(MISSING, module, *more)
        assert "No module named" not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or module == "benchmarks.first_minutes", done.stdout
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == {"correctness", "training"}
    assert "test_gpu.py::test_real_sizes" in done.stdout
