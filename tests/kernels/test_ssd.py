"""The scan of Mamba-2 on one sequence: values, gradients, what PyTorch does with it, and its messages."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ssds import (
    KINDS,
    SHAPES,
    TOLERANCES,
    Inputs,
    Sizes,
    compare,
    drawn_case,
    error,
    gradients_of,
    leaves_of,
    make_case,
    make_inputs,
    recurrence,
    rounded,
    run,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.ssd import bidirectional_ssd, ssd, ssd_reference
from ssmpretrain.kernels.ssd.chunked import ssd_in_chunks
from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.ssd.op import ssd_backward_op, ssd_op

MIDDLE = Sizes(2, 130, 4, 17, 2, 9)
SMALL = Sizes(2, 40, 4, 6, 2, 3)
PYTORCH = {"reference": ssd_reference, "chunked": ssd_in_chunks}


@pytest.fixture(params=["auto", "chunked", "reference"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs here, what runs without a compiler, and the definition."""
    if request.param == "chunked":
        monkeypatch.setattr(library, "is_available", lambda: False)
    return "reference" if request.param == "reference" else "auto"


def all_fields(inputs: Inputs, kind: str, chunk: int | None = None) -> SSDInputs:
    """The inputs of a call of `run` without its gate."""
    ahead, back = (inputs["dt"], inputs["A"]), (inputs.get("dt_backward"), inputs.get("A_backward"))
    if kind == "back":
        ahead, back = back, ahead
    scale = 0.5 if kind == "both" else 1.0
    return SSDInputs(inputs["x"], inputs["B"], inputs["C"], inputs["D"], *ahead, *back, scale, chunk, False)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_recurrence(shape: Sizes, kind: str, impl: str) -> None:
    compare(drawn_case(shape, kind), impl=impl)


@pytest.mark.parametrize("impl", ["auto", "chunked"], indirect=True)
def test_a_long_sequence_is_right_to_its_end(impl: str) -> None:
    compare(drawn_case(Sizes(1, 1000, 2, 8, 1, 7), "both"), impl=impl)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_goes_in_and_out(dtype: torch.dtype, kind: str, impl: str) -> None:
    compare(drawn_case(MIDDLE, kind, dtype), impl=impl)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [63, 130])
def test_large_steps_among_small_ones_lose_no_digits(tokens: int, dtype: torch.dtype, kind: str, impl: str) -> None:
    compare(drawn_case(MIDDLE._replace(tokens=tokens), kind, dtype, large_steps=True), impl=impl)


@pytest.mark.parametrize("name", ["dt", "A"])
def test_no_step_and_no_decay(name: str, impl: str) -> None:
    inputs = make_inputs(MIDDLE, "both")
    inputs[name] = torch.zeros_like(inputs[name])
    compare(make_case(inputs, "both"), impl=impl)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("D", "z")], ids=str)
def test_skip_and_gate_may_be_absent(absent: tuple[str, ...], impl: str) -> None:
    inputs = {name: t for name, t in make_inputs(SMALL, "both").items() if name not in absent}
    compare(make_case(inputs, "both"), impl=impl)
    compare(make_case(inputs, "both", torch.bfloat16), impl=impl)


def test_the_directions_are_halved_only_when_asked(impl: str) -> None:
    compare(make_case(make_inputs(SMALL, "both"), "both", scale=1.0), impl=impl, divide_output=False)


def test_the_backward_direction_takes_the_steps_and_decays_of_the_other(impl: Any) -> None:
    inputs = rounded(make_inputs(SMALL, "ahead"), torch.float32)
    both = bidirectional_ssd(**inputs, dt_backward=inputs["dt"], A_backward=inputs["A"], impl=impl)
    assert torch.equal(bidirectional_ssd(**inputs, impl=impl), both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [16, 48, 80, 256])
@pytest.mark.parametrize("impl", ["auto", "chunked"], indirect=True)
def test_chunks_of_any_size_give_one_answer(chunk: int, kind: str, impl: str) -> None:
    compare(drawn_case(MIDDLE, kind), impl=impl, chunk=chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_step_sizes_and_skip_may_have_another_dtype_than_x(dtype: torch.dtype) -> None:
    inputs = rounded(make_inputs(SMALL, "both"), torch.float32)
    inputs |= {name: inputs[name].to(dtype) for name in ("dt", "dt_backward", "D", "z")}
    y = bidirectional_ssd(**inputs)
    in_float32 = bidirectional_ssd(**{name: t.float() for name, t in inputs.items()})
    assert torch.equal(y, in_float32)
    leaves = leaves_of(inputs)
    gradients_of(bidirectional_ssd(**leaves), leaves, y)  # each in the dtype of its input


def test_autocast_changes_nothing(impl: Any) -> None:
    inputs = rounded(make_inputs(SMALL, "both"), torch.float32)
    expected = bidirectional_ssd(**inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bidirectional_ssd(**inputs, impl=impl), expected)


def test_any_strides_are_read() -> None:
    inputs = make_inputs(MIDDLE, "both")
    inputs.pop("z")  # PyTorch's SiLU rounds differently on other strides
    case = make_case(inputs, "both")
    dense = run("both", {name: t.contiguous() for name, t in case.inputs.items()})
    for arrange in (
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: t.flip(0).contiguous().flip(0),
    ):
        strided = {name: arrange(t) for name, t in case.inputs.items()}
        assert torch.equal(run("both", strided), dense)
        compare(case._replace(inputs=strided))
    one_row = {name: t[:, :1].expand(t.shape) if t.ndim > 1 else t for name, t in case.inputs.items()}
    assert not one_row["dt"].is_contiguous()
    assert torch.equal(run("both", one_row), run("both", {name: t.contiguous() for name, t in one_row.items()}))


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    case, results = drawn_case(MIDDLE, "both"), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        leaves = leaves_of(case.inputs)
        y = run("both", leaves)
        results.append({"y": y, **gradients_of(y, leaves, case.dy)})
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_pytorch_passes_gradcheck_and_is_exact_in_float64(kind: str, name: str) -> None:
    inputs = make_inputs(Sizes(1, 20, 2, 2, 1, 2), kind)
    inputs.pop("z")
    leaves = leaves_of(inputs)

    def call(*tensors: Tensor) -> Tensor:
        return PYTORCH[name](all_fields(dict(zip(leaves, tensors, strict=True)), kind, chunk=16))

    truth = recurrence(inputs, kind, 0.5 if kind == "both" else 1.0)[0]
    assert error(call(*leaves.values()), truth, truth) < TOLERANCES[torch.float64]
    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


# ---- what PyTorch does with it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "kind"), [(16, "back"), (40, "both")])  # 40: three chunks, whose states are kept
def test_operators_pass_opcheck(tokens: int, kind: str) -> None:
    fields = all_fields(rounded(make_inputs(SMALL._replace(tokens=tokens), kind), torch.float32), kind, chunk=16)
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in fields]
    torch.library.opcheck(ssd_op, (*leaves, True, "native"))
    torch.library.opcheck(ssd_op, (*fields, False, "native"))
    y, states = ssd_op(*fields, True, "native")
    assert (states.numel() > 0) is (tokens > 16)
    torch.library.opcheck(ssd_backward_op, (y, states, *fields, "native"))


@pytest.mark.parametrize(
    ("impl", "kind"),
    [("auto", "back"), ("auto", "both"), pytest.param("chunked", "both", marks=pytest.mark.slow)],
    indirect=["impl"],
)
def test_compiles_without_graph_breaks(kind: str, impl: str) -> None:
    case = drawn_case(SMALL, kind)

    def loss(*tensors: Tensor) -> Tensor:
        return run(kind, dict(zip(case.inputs, tensors, strict=True))).square().mean()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = list(leaves_of(case.inputs).values())
        y = call(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


class Scan(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, inputs: Inputs) -> Tensor:
        return run(self.kind, inputs)


def exported(sizes: Sizes, kind: str) -> tuple[torch.export.ExportedProgram, Inputs]:
    inputs = rounded(make_inputs(sizes, kind), torch.float32)
    batched = {name: {0: torch.export.Dim("batch")} if t.ndim > 1 else None for name, t in inputs.items()}
    return torch.export.export(Scan(kind), (inputs,), dynamic_shapes=(batched,)), inputs


def of_batch(inputs: Inputs, size: int) -> Inputs:
    """The entries of a batch again and again, some of them scaled, so that each differs."""
    grown = {name: torch.cat([t * (1 + i) for i in range(size)])[:size] for name, t in inputs.items() if t.ndim > 1}
    return {**inputs, **grown}


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "kind"), [(80, "back"), pytest.param(130, "both", marks=pytest.mark.slow)])
def test_exported_it_is_pytorch_alone_and_takes_any_batch(tokens: int, kind: str) -> None:
    program, inputs = exported(SMALL._replace(tokens=tokens), kind)
    assert "ssmpretrain" not in str(program)
    assert len(program.graph.nodes) < 200  # at any length
    five = of_batch(inputs, 5)
    truth = recurrence({name: t.double() for name, t in five.items()}, kind, 0.5 if kind == "both" else 1.0)[0]
    assert error(program.module()(five), truth, truth) < TOLERANCES[torch.float32]


@pytest.mark.slow
@torch.no_grad()
def test_onnx_has_no_loop_and_runs_at_any_batch(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    program, inputs = exported(MIDDLE, "both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, f=tmp_path / "ssd.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "ssd.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert not {"Scan", "Loop", "If"} & set(kinds)
    assert 0 < kinds.count("MatMul") < 12
    session = onnxruntime.InferenceSession(tmp_path / "ssd.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for size in (1, 2, 5):
        batch = of_batch(inputs, size)
        (y,) = session.run(None, {name: t.numpy() for name, t in zip(names, batch.values(), strict=True)})
        truth = recurrence({name: t.double() for name, t in batch.items()}, "both", 0.5)[0]
        assert error(torch.from_numpy(y), truth, truth) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(("tokens", "chunk"), [(40, None), (130, None), (130, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_counted_on_the_meta_device(kind: str, tokens: int, chunk: int | None) -> None:
    sizes = MIDDLE._replace(tokens=tokens)
    leaves = {name: t.to("meta").requires_grad_() for name, t in make_inputs(sizes, kind).items() if name != "z"}
    leaves = {name: t.detach().float().requires_grad_() for name, t in leaves.items()}
    steps = min(chunk or 64, tokens)  # tokens that each token may read inside its chunk
    per_token = 2 * steps * (sizes.groups * sizes.state + sizes.heads * sizes.channels)
    if tokens > steps:  # into the state and out of it, in each direction
        per_token += 4 * sizes.heads * sizes.state * sizes.channels * (2 if kind == "both" else 1)
    with FlopCounterMode(display=False) as counter:
        y = run(kind, leaves, chunk=chunk)
    assert y.shape == leaves["x"].shape and y.device.type == "meta"
    assert counter.get_total_flops() == sizes.batch * tokens * per_token
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * sizes.batch * tokens * per_token


# ---- errors ----------------------------------------------------------------------------------------------------------


def _replacing(name: str, value: Any, message: str) -> Any:
    return pytest.param(name, value, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        _replacing("x", torch.zeros(2, 40, 24), r"x is \(B, L, H, P\), none but B 0; got \(2, 40, 24\)"),
        _replacing("x", torch.zeros(2, 0, 4, 6), r"none but B 0; got \(2, 0, 4, 6\)"),
        _replacing("x", torch.zeros(2, 40, 4, 6).long(), "x is float32, bfloat16 or float16; got torch.int64"),
        _replacing("x", torch.zeros(2, 40, 4, 6).double(), "with a float64 x every input is float64; got dt"),
        _replacing("dt", torch.zeros(2, 40, 3), r"dt is \(B, L, H\) = \(2, 40, 4\) like x; got \(2, 40, 3\)"),
        _replacing("dt_backward", torch.zeros(2, 40), r"dt_backward is \(B, L, H\) = .*; got \(2, 40\)"),
        _replacing("A", torch.zeros(4, 3), r"A is \(H,\) with x's H = 4; got \(4, 3\)"),
        _replacing("A_backward", torch.zeros(4).half(), "A_backward is float32, .*; got torch.float16"),
        _replacing("D", torch.zeros(6), r"D is \(H,\) with x's H = 4; got \(6,\)"),
        _replacing("B", torch.zeros(2, 41, 2, 3), r"B is \(B, L, G, N\) with B, L = 2, 40 like x; got \(2, 41, 2, 3\)"),
        _replacing("C", torch.zeros(2, 40, 3), r"C is \(B, L, G, N\) with B, L = 2, 40 like x; got \(2, 40, 3\)"),
        _replacing("C", torch.zeros(2, 40, 2, 0), r"C is \(B, L, G, N\) .*; got \(2, 40, 2, 0\)"),
        _replacing("B", torch.zeros(2, 40, 3, 3), "the number of groups G of B divides x's H = 4; got G = 3"),
        _replacing("B", torch.zeros(2, 40, 2, 3).half(), "B has x's dtype, torch.float32; got torch.float16"),
        _replacing("C", torch.zeros(2, 40, 2, 4), r"B and C share one shape; got B \(2, 40, 2, 3\) and C \(2, 40, 2"),
        _replacing("z", torch.zeros(2, 40, 4, 5), r"z is \(B, L, H, P\) like x, .*; got \(2, 40, 4, 5\)"),
        _replacing("z", torch.zeros(2, 40, 4, 6, device="meta"), "one device; got x on cpu and z on meta"),
        _replacing("D", [0.0] * 4, "D is a tensor or None; got list"),
        _replacing("chunk", 24, "chunk is a multiple of 16 from 16 to 256, or None; got 24"),
        _replacing("chunk", 272, "chunk is a multiple of 16 .*; got 272"),
        _replacing("chunk", 0, "chunk is a multiple of 16 .*; got 0"),
        _replacing("chunk", 32.0, "chunk is a multiple of 16 .*; got 32.0"),
        _replacing("impl", "cuda", "impl is one of auto, reference, cpu, triton; got 'cuda'"),
        _replacing("impl", "triton", "impl='triton' takes CUDA tensors; got cpu"),
    ],
)
def test_bad_input_is_named(name: str, value: Any, message: str) -> None:
    inputs: dict[str, Any] = {**rounded(make_inputs(SMALL, "both"), torch.float32), name: value}
    with pytest.raises(ValueError, match=rf"^bidirectional_ssd: .*{message}"):
        bidirectional_ssd(**inputs)


def test_messages_of_one_direction_begin_with_its_name() -> None:
    inputs = rounded(make_inputs(SMALL, "ahead"), torch.float32)
    with pytest.raises(ValueError, match=r"^ssd: dt is \(B, L, H\) = \(2, 40, 4\) like x; got \(2, 40\)\. Change"):
        ssd(**{**inputs, "dt": torch.zeros(2, 40)})
