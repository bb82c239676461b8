"""The benchmarks' own machinery, on a CPU and tiny sizes: what it times is right, and what it says is so."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ceilings, comparators, dense, encoders, joint_embedding, operations, report, smoke, suites
from benchmarks.case import Case, OpCase
from benchmarks.cases import all_cases
from benchmarks.checks import OpCheck
from benchmarks.measure import FEWEST_TURNS, WARM_UPS, side_by_side
from benchmarks.operations.add_norm import add_norm_case
from benchmarks.operations.bidirectional_scan import bidirectional_scan_case
from benchmarks.operations.vim_block import vim_block_case
from benchmarks.run import main
from ssmpretrain.kernels.causal_conv1d import causal_conv1d_reference
from ssmpretrain.kernels.selective_scan import selective_scan_reference
from ssmpretrain.objectives import DINO

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
ONES = {"copy_TBs": 1.0, "gemm_TFs": 1.0, "exp2_Ts": 1.0}


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small_case() -> OpCase:
    return add_norm_case("tiny", torch.float32, D=8, L=5, B=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> int:
    return main(["--threads", "1", *arguments])


@pytest.mark.slow
def test_a_run_checks_and_times_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    code = run("--suite", "all", "--out", str(file))
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert len(printed.splitlines()) <= 40
    result = json.loads(file.read_text())
    assert result["skipped"] == [] and result["host"]["torch"] == torch.__version__
    assert all(rate > 0 for rate in result["ceilings"].values())

    cases = all_cases({"op", "block", "model"}, [torch.bfloat16], tiny=True)
    ours = [row for row in result["rows"] if row["impl"] == suites.OURS]
    assert [(row["case"], row["mode"]) for row in ours] == [(case.name, mode) for case in cases for mode in case.modes]
    for row in ours:
        assert row["ok"] and row["rel_err"] and row.get("deterministic", True), row
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] and row["ms"]["repeat_median"] > 0
        assert row["ms"]["n"] >= FEWEST_TURNS
    for row in result["rows"]:
        assert ("ms" in row) != bool(row.get("absent")), row
    scan = next(row for row in ours if row["op"] == "selective_scan" and row["mode"] == "forward")
    assert scan["work"]["updates"] == 3 * 67 * 40 * 16
    # u, delta, z and y (B, L, E) and B, C (B, L, N) in bfloat16; A, D and bias in float32
    assert scan["work"]["bytes"] == 2 * 3 * 67 * (4 * 40 + 2 * 16) + 4 * 40 * (16 + 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--suite", "op", "--device", "cuda", "--out", str(tmp_path / "bench.json")) == 2
    said = capsys.readouterr().err.strip()
    assert said == "benchmarks: --device cuda needs a CUDA GPU; PyTorch sees none. Use --device cpu."
    assert not (tmp_path / "bench.json").exists()


def test_cases_beyond_the_budget_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("--suite", "op", "--budget-s", "0", "--out", str(tmp_path / "bench.json"))
    result = json.loads((tmp_path / "bench.json").read_text())
    assert code == 0 and result["rows"] == []
    assert [name.split()[0] for name in result["skipped"]][:2] == ["add_norm", "bidirectional_scan"]
    assert f"no time left for {len(result['skipped'])}: add_norm" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--dtype", "--vs"])
def test_unknown_words_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(option, "fp8")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{option} takes " in message and "fp8" in message


def nan_at(y: Tensor, sequence: int) -> Tensor:
    """y with a NaN somewhere in one sequence."""
    spoiled = torch.zeros_like(y)
    spoiled[sequence, 0, 0] = float("nan")
    return y + spoiled


def slope_only(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "an output": ("y0", lambda y, h, **_: (y + 1e-3, h)),
    "a NaN where it is compared": ("y1", lambda y, h, **_: (y, nan_at(h, -1))),
    "a NaN in another sequence": ("y1", lambda y, h, **_: (y, nan_at(h, 0))),
    "the gradient of an input": (
        "dresidual",
        lambda y, h, residual, **_: (y, h + 1e-3 * (residual - residual.detach())),
    ),
    "the gradient of a parameter": ("dweight", lambda y, h, weight, **_: (y + 1e-3 * (weight - weight.detach()), h)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_and_not_timed(what: str) -> None:
    case = small_case()
    name, spoil = WRONG[what]
    wrong = replace(case, run=lambda **named: spoil(*case.reference(**named), **named))
    (row, again) = suites.rows(wrong, CPU, ONES, None)
    assert row["ok"] is False and row["why"].startswith(f"{name} is off by "), row
    assert "ms" not in row and "ms" not in again
    table = report.table({"ceilings": ONES, "rows": [row, again], "skipped": []})
    assert f"NOT TIMED: {name} is off by" in table


def test_while_checked_unwritten_outputs_are_nan() -> None:
    case = small_case()
    unwritten: list[Tensor] = []

    def watched(**named: Tensor) -> Any:
        unwritten.append(torch.empty(64))
        return case.reference(**named)

    checker = OpCheck(case, random())
    assert checker.of(watched).ok
    assert len(unwritten) == 3 and all(tensor.isnan().all() for tensor in unwritten)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_differs_from_the_last_is_not_deterministic() -> None:
    case = small_case()
    calls = iter(range(10))

    def drifting(**named: Tensor) -> tuple[Tensor, ...]:
        scale = 1 + 1e-7 * next(calls)
        return tuple(scale * y for y in case.reference(**named))

    check = OpCheck(case, random()).of(drifting)
    assert check.ok and check.deterministic is False
    assert OpCheck(case, random()).of(case.reference).deterministic


def test_a_case_that_breaks_is_reported_and_the_others_run() -> None:
    def broken(**_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    (row,) = suites.rows(replace(small_case(), run=broken), CPU, ONES, None)
    assert row["ok"] is False and row["why"] == "RuntimeError: no kernel image"


def test_a_wrong_comparator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case()

    def zeros(**named: Tensor) -> tuple[Tensor, ...]:
        return tuple(0 * y for y in case.reference(**named))

    other = comparators.Comparator("other", lambda: (True, ""), lambda inputs: inputs, zeros)
    monkeypatch.setattr(comparators, "of_op", lambda _: [other])
    rows = suites.rows(case, CPU, ONES, None)
    assert [row["impl"] for row in rows] == [suites.OURS, "other"] * 2
    assert all("ms" in row for row in rows[::2])
    assert all("it is wrong" in row["absent"] and row["ok"] is False for row in rows[1::2])


def test_a_comparator_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Tensor) -> Tensor:
        raise TypeError("unexpected argument")

    other = comparators.Comparator("other", lambda: (True, ""), lambda inputs: inputs, broken)
    monkeypatch.setattr(comparators, "of_op", lambda _: [other])
    rows = suites.rows(small_case(), CPU, ONES, None)
    assert all("ms" in row for row in rows[::2])
    assert [row["absent"] for row in rows[1::2]] == ["fails: TypeError: unexpected argument"] * 2


def test_comparators_can_be_chosen() -> None:
    rows = suites.rows(small_case(), CPU, ONES, {"mamba"})
    assert {row["impl"] for row in rows} == {suites.OURS, "mamba"}


def test_turns_alternate_and_the_first_is_timed_twice() -> None:
    calls: list[str] = []
    times, failed = side_by_side(CPU, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a"] * WARM_UPS + ["b"] * WARM_UPS + ["a", "b", "a"] * 20
    assert failed == {} and times["a"]["n"] == times["b"]["n"] == 20
    assert "repeat_median" in times["a"] and "repeat_median" not in times["b"]


def test_slow_work_gets_fewer_turns_but_never_too_few() -> None:
    times, _ = side_by_side(CPU, {"a": lambda: sum(range(200_000))}, limit_s=0.0)
    assert times["a"]["n"] == FEWEST_TURNS


def test_a_rival_that_fails_gives_a_reason_and_our_own_failure_is_raised() -> None:
    def broken() -> None:
        raise RuntimeError("CUDA out of memory\nmore")

    times, failed = side_by_side(CPU, {"a": lambda: None, "b": broken})
    assert set(times) == {"a"} and failed == {"b": "RuntimeError: CUDA out of memory"}
    with pytest.raises(RuntimeError, match="out of memory"):
        side_by_side(CPU, {"a": broken})


def test_inputs_take_turns_beyond_the_cache() -> None:
    assert suites.sets_of_inputs(2**30) == 1
    assert suites.sets_of_inputs(70 * 2**20) == 3
    assert suites.sets_of_inputs(1) == 8


@pytest.mark.parametrize("make", [bidirectional_scan_case, vim_block_case], ids=["mixer", "block"])
def test_vims_own_mixer_is_put_together_rightly(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages are not here: the definitions of their two functions take their place."""

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_reference(x, weight, bias, activation="silu")

    def scan(**named: Any) -> Any:
        return selective_scan_reference(**named, delta_softplus=True)

    monkeypatch.setattr(comparators, "_packaged_conv", conv)
    monkeypatch.setattr(comparators, "_mamba_scan", scan)
    sizes = {"D": 16} if make is vim_block_case else {"E": 16, "R": 2}
    case = make("tiny", torch.float32, L=9, B=2, **sizes)
    (other,) = [c for c in comparators.of_op(case) if c.name == "mamba"]
    check = OpCheck(case, random()).of(lambda **named: other.run(**other.arrange(named)), repeat=False)
    assert check.ok, check.worst


def test_absent_packages_say_why() -> None:
    for case in all_cases({"op", "block"}, [torch.float32], tiny=True):
        assert isinstance(case, OpCase)
        for other in comparators.of_op(case):
            present, why = other.available()
            assert present != bool(why), other.name


def test_every_attention_backend_is_named() -> None:
    cases: list[Case] = all_cases({"model"}, [torch.bfloat16], tiny=False)
    assert [case.name for case in cases if "2-" not in case.name][:3] == ["Vim-Ti 1248", "VMamba-T 224", "Vim-Ti 224"]
    names = [name for case in cases if not isinstance(case, OpCase) for name in comparators.of_model(case)]
    assert {name.split()[1] for name in names if name.startswith("deit_tiny")} == {*comparators.BACKENDS, "compiled"}


def test_an_operation_is_measured_where_a_module_has_its_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = "from benchmarks.operations.add_norm import add_norm_case\n"
    source += "def tiny_cases(dtype):\n    yield add_norm_case('from outside', dtype, D=4, L=5, B=3)\n"
    (tmp_path / "outside.py").write_text(source)
    monkeypatch.setattr(operations, "__path__", [*operations.__path__, str(tmp_path)])
    names = [case.name for case in all_cases({"op"}, [torch.float32], tiny=True)]
    assert "add_norm from outside L=5" in names and "selective_scan tiny L=67" in names


def test_cases_with_a_target_come_first() -> None:
    cases = all_cases({"op", "block"}, [torch.bfloat16], tiny=False)
    targets = [case.name for case in cases if isinstance(case, OpCase) and case.has_target]
    assert targets == [case.name for case in cases[: len(targets)]] and len(targets) == 4


def test_full_size_cases_fill_a_gpu_and_fit_it() -> None:
    cases = all_cases({"op", "block"}, [torch.bfloat16, torch.float32], tiny=False)
    for case in cases:
        tokens = case.sizes.get("L") or case.sizes["H"] * case.sizes["W"]
        channels = case.sizes.get("E") or case.sizes["D"]
        activations = 4 * case.sizes["B"] * tokens * channels * case.dtype.itemsize
        assert 0.5e9 < activations <= 1.25e9, case.name
    assert len({(case.name, case.dtype) for case in cases}) == len(cases)


def test_the_exponential_kernel_does_little_else() -> None:
    pytest.importorskip("triton")
    from benchmarks.exp2_kernel import BLOCK, exp2_chain
    from ssmpretrain.kernels.gpu.ahead_of_time import compile_launch
    from ssmpretrain.kernels.gpu.launch import Launch

    x = torch.empty(BLOCK, device="meta")
    compiled = compile_launch(Launch(exp2_chain, (1,), {"x": x, "y": x, "STEPS": 1024, "BLOCK": BLOCK}, 4), "sm_90")
    loop = compiled.loops[0]
    exponentials = loop["MUFU.EX2"]
    # one exponential takes the issue slots of eight other instructions
    assert exponentials >= 8 and loop.total() - exponentials < 2 * exponentials


def test_ceilings_are_positive() -> None:
    assert all(rate > 0 for rate in ceilings.measure(CPU).values())


def test_streaming_and_decoders_are_timed_beside_the_same_work_from_memory(tmp_path: Path) -> None:
    from benchmarks import data

    jpegs = data.photographs(64)
    found = [*data.streaming_rows(jpegs, tmp_path, turns=1), *data.decoder_rows(jpegs[:2], turns=1)]
    assert [row["case"] for row in found[:3]] == ["streaming, 0 workers", "streaming, 1 workers", "decode, torchvision"]
    assert all(row["ours_ms"] > 0 and row["ratio"] > 0 for row in found if "absent" not in row)
    assert len(data.table(found).splitlines()) == len(found)


def test_several_views_are_timed_beside_one_view() -> None:
    from benchmarks import data, views

    found = views.rows(data.photographs(1), turns=1)
    assert [row["case"] for row in found[:2]] == ["one view of 224", "2 + 8 views of 224 and 96, crops"]
    assert all(row["ours_ms"] >= 0 and row["ratio"] >= 0 for row in found)
    assert len(data.table(found).splitlines()) == len(found) == 4 + 2 * 8


def test_the_dense_suite_has_a_row_for_each_mode_and_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "ENCODERS", {"Vim": "test_vim", "VMamba": "test_vmamba"})
    monkeypatch.setattr(dense, "peak_memory", lambda mode, name, px, *_: {"above_idle_mib": float(px) ** 2})
    rows = dense.rows(CPU, 1, {"maps": (32, 64), "maps-train": (32, 64)})
    assert [(row["mode"], row["case"]) for row in rows] == [
        (mode, case) for mode in ("maps", "maps-train") for case in ("Vim", "VMamba")
    ]
    for row in rows:
        assert row["exponent_mib"] == pytest.approx(1)
        assert row["ms"].keys() == row["mib"].keys() == {32, 64} and all(ms > 0 for ms in row["ms"].values())
    assert len(dense.table(rows).splitlines()) == 6 and "1024 M" in dense.table(rows)


def test_the_joint_embedding_suite_has_a_row_for_each_encoder_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
    methods = {**joint_embedding.METHODS, "iBOT": (1, lambda name: DINO(name, ibot=1.0, **small))}
    monkeypatch.setattr(joint_embedding, "METHODS", {name: methods[name] for name in ("MAE", "iBOT")})
    monkeypatch.setattr(joint_embedding, "ENCODERS", {"Vim": "test_vim"})
    monkeypatch.setattr(joint_embedding, "peak_memory", lambda case, method, *_: {"above_idle_mib": len(method)})
    rows = joint_embedding.rows(CPU, 1, B=2, px=64, turns=1)
    assert [row["case"] for row in rows] == ["MAE", "iBOT"]
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1 and all(row["ms"] > 0 for row in rows)
    assert len(joint_embedding.table(rows).splitlines()) == 1 + len(rows)


def test_the_encoders_suite_compares_what_takes_turns_and_judges_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {("test_vim", mode, 32): (100.0, 1e-9) for mode in ("inference", "training step")}
    group = encoders.Group(("test_vim", "not_there"), "test_vit", (32,), limits)
    monkeypatch.setattr(encoders, "interleaved", lambda runs, _: {name: {"min_ms": len(name)} for name in runs})
    rows = list(encoders.rows(1, [torch.float32, torch.bfloat16], (32, 64), groups=[group]))
    ours = [row for row in rows if row["case"] == "test_vim"]
    assert [(row["mode"], row["dtype"], row["batch"], row["threads"], row["state"]) for row in ours] == [
        ("inference", "float32", 1, 1, "eager"),
        ("training step", "float32", 8, 1, "eager"),
        ("inference", "bfloat16", 1, 1, "eager"),
        ("training step", "bfloat16", 8, 1, "eager"),
    ]
    assert all(row["ratios"] == {"test_vit eager": 1.0} for row in ours)
    assert [row["reached"] for row in ours] == [True, True, False, False]
    lines = encoders.table(rows).splitlines()
    assert len(lines) == len(rows) == 8
    assert lines[1] == (
        "test_vim eager, 32 px inference, batch 1, float32, threads 1: 14.0 ms = 1.00 of test_vit eager; "
        "target 100.00 reached"
    )
    assert lines[-1].endswith("target 0.00 MISSED")


def test_a_compiled_encoder_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: calls.append(module) or module)
    monkeypatch.setattr(encoders, "interleaved", lambda runs, _: {name: {"min_ms": 1.0} for name in runs})
    group = encoders.Group((), "test_vit", (32,), {})
    rows = list(encoders.rows(1, pixels=(32,), compiled=True, groups=[group]))
    assert [row["state"] for row in rows] == ["eager", "compiled"] * 2 and len(calls) == 2


def test_the_scan_in_chunks_of_the_smoke_suite_is_the_scan() -> None:
    names = ("cpu", "chunks", "loop")
    results = {name: smoke.scan(name, smoke.scan_inputs(1, 4, 3, 17, True), True)() for name in names}
    for name in ("chunks", "loop"):
        assert torch.allclose(results[name], results["cpu"], atol=1e-5), name
