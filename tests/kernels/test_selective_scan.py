import warnings
from typing import Any

import pytest
import torch
from selective_scans import TOLERANCES, compare, error, leaf, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference
from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.selective_scan.op import selective_scan_backward_op, selective_scan_op


class OperatorCalls(TorchDispatchMode):
    """Records the arguments of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ssmpretrain":
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


SHAPES = [  # batch, channels, tokens, state, groups
    (2, 5, 1, 3, None),
    (1, 17, 2, 16, None),
    (2, 24, 63, 1, None),
    (2, 24, 197, 20, 2),
    (1, 384, 197, 16, None),
    (3, 40, 65, 16, 4),
    (1, 6, 130, 8, 6),
    (1, 5, 1000, 16, None),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_agrees_with_the_reference_forward_and_backward(shape: tuple[Any, ...], impl: str) -> None:
    compare(make_inputs(*shape), impl, delta_softplus=True)


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_reverse_agrees_with_the_reference(impl: str) -> None:
    compare(make_inputs(2, 24, 70, 16, 2), impl, delta_softplus=True, reverse=True)


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_optional_inputs_may_be_absent(impl: str) -> None:
    compare(make_inputs(2, 24, 40, 16, softplus=False, optional=False), impl)


def test_reverse_is_the_flipped_scan_of_flipped_inputs() -> None:
    inputs = make_inputs(2, 24, 70, 16)
    flipped = {name: t.flip(-1) if t.ndim == 3 else t for name, t in inputs.items()}
    expected = selective_scan(**flipped, delta_softplus=True).flip(-1)
    torch.testing.assert_close(selective_scan(**inputs, delta_softplus=True, reverse=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    compare(make_inputs(2, 40, 70, 16, 2, dtype=dtype), delta_softplus=True)


def test_each_input_has_its_own_dtype() -> None:
    inputs = make_inputs(2, 24, 50, 16)
    inputs |= {"u": inputs["u"].bfloat16(), "B": inputs["B"].half(), "z": inputs["z"].bfloat16()}
    inputs["D"] = inputs["D"].bfloat16()
    compare(inputs, delta_softplus=True)


def test_any_strides_are_read() -> None:
    inputs = make_inputs(2, 40, 70, 16)
    dense = selective_scan(**inputs, delta_softplus=True)
    strided = dict(inputs)
    strided["u"] = inputs["u"].mT.contiguous().mT  # channel-last
    strided["delta"] = torch.stack([inputs["delta"], inputs["delta"]], dim=-1)[..., 1]  # every second element
    strided["B"] = inputs["B"].mT.contiguous().mT
    strided["z"] = torch.cat([inputs["z"], inputs["z"]], dim=1)[:, 40:]
    out = selective_scan(**strided, delta_softplus=True)
    assert out.stride() == strided["u"].stride()
    torch.testing.assert_close(out, dense, rtol=0, atol=0)
    compare(strided, delta_softplus=True)


def test_expanded_inputs_are_read() -> None:
    inputs = make_inputs(3, 24, 30, 16)
    inputs["u"] = inputs["u"][:, :1].expand(-1, 24, -1)
    inputs["B"] = inputs["B"][:1].expand(3, -1, -1)
    assert 0 in inputs["u"].stride()
    out = selective_scan(**inputs, delta_softplus=True)
    truth = selective_scan_reference(**{name: t.double() for name, t in inputs.items()}, delta_softplus=True)
    assert error(out, truth) < TOLERANCES[torch.float32]


def test_gradient_of_the_last_state_alone_flows() -> None:
    inputs = {name: leaf(t) for name, t in make_inputs(1, 5, 20, 4, softplus=False, optional=False).items()}
    _, last = selective_scan(**inputs, return_last_state=True)
    grads = torch.autograd.grad(last.sum(), list(inputs.values()), allow_unused=True)
    truth_inputs = {name: leaf(t, torch.float64) for name, t in inputs.items()}
    _, truth = selective_scan_reference(**truth_inputs, return_last_state=True)
    names = ["u", "delta", "A", "B"]
    expected = torch.autograd.grad(truth.sum(), [truth_inputs[name] for name in names])
    for name, ours, theirs in zip(names, grads, expected, strict=False):
        assert error(ours, theirs) < TOLERANCES[torch.float32], name


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    inputs = make_inputs(2, 40, 130, 16, 2)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        leaves = [leaf(t) for t in inputs.values()]
        out, last = selective_scan(
            **dict(zip(inputs, leaves, strict=True)), delta_softplus=True, return_last_state=True
        )
        results.append([out, last, *torch.autograd.grad(out.square().sum() + last.sum(), leaves)])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_working_memory_left_by_another_call_does_not_matter() -> None:
    inputs = make_inputs(1, 24, 50, 16)
    clean = selective_scan(**inputs, delta_softplus=True)
    poison = {name: leaf(torch.full_like(t, torch.nan)) for name, t in make_inputs(2, 48, 100, 16).items()}
    selective_scan(**poison, delta_softplus=True).sum().backward()
    assert poison["u"].grad is not None and poison["u"].grad.isnan().all()
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), clean)
    compare(inputs, delta_softplus=True)


@pytest.mark.parametrize("impl", ["cpu", "chunked", "reference"])
def test_huge_steps_forget_everything_without_nan(impl: str) -> None:
    # exp(delta A) underflows to 0, so each output depends on its own token only
    inputs = make_inputs(1, 5, 40, 4, optional=False)
    inputs["delta"] = torch.full_like(inputs["delta"], 1e4)
    leaves = {name: leaf(t) for name, t in inputs.items()}
    out = scan_in_chunks(ScanInputs(**leaves))[0] if impl == "chunked" else selective_scan(**leaves, impl=impl)
    expected = inputs["u"] * inputs["delta"] * (inputs["B"] * inputs["C"]).sum(1, keepdim=True)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-2)  # atol: 1e-6 of the largest term
    for grad in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["cpu", "chunked"])
def test_tiny_steps_keep_their_relative_precision(impl: str) -> None:
    inputs = make_inputs(1, 5, 40, 4)
    inputs["delta_bias"] = torch.full_like(inputs["delta_bias"], -20.0)  # softplus gives about 1e-9
    inputs["D"] = torch.zeros_like(inputs["D"])
    compare(inputs, impl, delta_softplus=True)


def test_nan_is_not_hidden() -> None:
    inputs = make_inputs(1, 5, 10, 4)
    inputs["delta"][0, 2, 5] = torch.nan
    out = selective_scan(**inputs, delta_softplus=True)
    assert out[0, 2, 5:].isnan().all()
    assert out[0, 2, :5].isfinite().all() and out[0, [0, 1, 3, 4]].isfinite().all()


def test_float64_runs_the_reference_and_passes_gradcheck() -> None:
    inputs = {name: leaf(t, torch.float64) for name, t in make_inputs(2, 4, 5, 3, 2).items()}

    def scan(*tensors: Tensor) -> Any:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, reverse=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_no_states_are_kept_without_gradients() -> None:
    inputs = make_inputs(1, 24, 100, 16)
    named = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    named[3:5] = [t.unsqueeze(1) for t in named[3:5]]
    _, _, states = selective_scan_op(*named, True, False, False, "native")
    assert states.numel() == 0
    with torch.no_grad(), OperatorCalls() as seen:
        selective_scan(**{name: leaf(t) for name, t in inputs.items()})
    assert [arguments[-2] for arguments in seen.arguments] == [False]


def test_operators_pass_opcheck() -> None:
    # 16 channels a group: the kept states then have no padding, whose content is free, and can be compared
    inputs = make_inputs(2, 32, 40, 16, 2)
    named = [leaf(inputs[name]) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    torch.library.opcheck(selective_scan_op, (*named, True, False, True, "native"))
    detached = [t.detach() for t in named]
    torch.library.opcheck(selective_scan_op, (*detached, True, False, False, "native"))
    out, last, states = selective_scan_op(*detached, True, False, True, "native")
    torch.library.opcheck(selective_scan_backward_op, (out, last, states, *detached, True, False, "native"))


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(2, 24, 40, 16)

    def loss(*tensors: Tensor) -> Tensor:
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_leaves, leaves = ([leaf(t) for t in inputs.values()] for _ in range(2))
    eager, ours = loss(*eager_leaves), compiled(*leaves)
    torch.testing.assert_close(ours, eager)
    expected = torch.autograd.grad(eager, eager_leaves)
    for theirs, grad in zip(expected, torch.autograd.grad(ours, leaves), strict=True):
        torch.testing.assert_close(grad, theirs)


def test_flops_are_counted() -> None:
    inputs = {name: leaf(t) for name, t in make_inputs(2, 24, 40, 16).items()}
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(**inputs, delta_softplus=True)
    assert counter.get_total_flops() == 9 * 2 * 24 * 40 * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 23 * 2 * 24 * 40 * 16


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(1, 24, 30, 16)
    expected = selective_scan(**inputs, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**inputs, delta_softplus=True), expected)


def _without(name: str, value: Any, message: str) -> Any:
    return pytest.param(name, value, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        _without("u", torch.zeros(5, 10), r"u is \(B, E, L\), none but B 0; got \(5, 10\)"),
        _without("u", torch.zeros(1, 6, 0), r"none but B 0; got \(1, 6, 0\)"),
        _without("u", torch.zeros(1, 6, 10, dtype=torch.long), "u is float32, bfloat16 or float16; got torch.int64"),
        _without("u", torch.zeros(1, 6, 10, dtype=torch.float64), "with a float64 u every input is float64; got delta"),
        _without("delta", torch.zeros(1, 6, 9), r"delta is \(B, E, L\) like u, \(1, 6, 10\); got \(1, 6, 9\)"),
        _without("A", torch.zeros(6), r"A is \(E, N\) with u's E = 6 and N at least 1; got \(6,\)"),
        _without("A", torch.zeros(6, 4).bfloat16(), "A is float32, .*; got torch.bfloat16"),
        _without("B", torch.zeros(1, 5, 10), r"B is \(B, N, L\) or .* B, N, L = 1, 4, 10; got \(1, 5, 10\)"),
        _without("C", torch.zeros(1, 2, 4, 10), r"B and C share one shape"),
        _without("B", torch.zeros(1, 4, 4, 10), "the number of groups G of B divides u's E = 6; got G = 4"),
        _without("D", torch.zeros(5), r"D is \(E,\) with u's E = 6; got \(5,\)"),
        _without(
            "z", torch.zeros(1, 6, 10, device="meta"), "all tensors are on one device; got u on cpu and z on meta"
        ),
        _without("delta_bias", torch.zeros(6, dtype=torch.int32), "delta_bias is float32, .*; got torch.int32"),
        _without("impl", "cuda", "impl is one of auto, reference, cpu, triton; got 'cuda'"),
        _without("impl", "triton", "impl='triton' takes CUDA tensors; got cpu. Move them, use impl='auto', or"),
    ],
)
def test_bad_input_is_named(name: str, value: Any, message: str) -> None:
    inputs: dict[str, Any] = {**make_inputs(1, 6, 10, 4), name: value}
    with pytest.raises(ValueError, match=rf"^selective_scan: .*{message}"):
        selective_scan(**inputs)


def test_cpu_kernel_refuses_other_devices() -> None:
    inputs = {name: t.to("meta") for name, t in make_inputs(1, 6, 10, 4).items()}
    with pytest.raises(ValueError, match="impl='cpu' takes CPU tensors; got meta"):
        selective_scan(**inputs, impl="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selective_scan(**inputs).shape == (1, 6, 10)


# What torch.export traces


class Scan(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return selective_scan(**inputs, **self.options)


@torch.no_grad()
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_exported_it_is_pytorch_alone_and_takes_any_batch(shape: tuple[Any, ...], reverse: bool) -> None:
    inputs = make_inputs(*shape)
    batched = {name: {0: torch.export.Dim("batch")} if t.ndim > 2 else None for name, t in inputs.items()}
    scan = Scan(delta_softplus=True, return_last_state=True, reverse=reverse)
    program = torch.export.export(scan, (inputs,), dynamic_shapes=(batched,))
    assert "ssmpretrain" not in str(program)
    assert len(program.graph.nodes) < 100  # at any length
    five = {name: torch.cat([t, t.flip(0), t])[:5] if t.ndim > 2 else t for name, t in inputs.items()}
    truth = selective_scan_reference(
        **{name: t.double() for name, t in five.items()}, delta_softplus=True, return_last_state=True, reverse=reverse
    )
    for ours, expected in zip(program.module()(five), truth, strict=True):
        assert error(ours, expected) < TOLERANCES[torch.float32]


@torch.no_grad()
def test_exported_without_the_optional_inputs_it_keeps_the_dtype() -> None:
    inputs = make_inputs(2, 24, 40, 16, softplus=False, optional=False, dtype=torch.bfloat16)
    out = torch.export.export(Scan(), (inputs,)).module()(inputs)
    assert out.dtype == torch.bfloat16
    truth = selective_scan_reference(**{name: t.double() for name, t in inputs.items()})
    assert error(out, truth) < TOLERANCES[torch.bfloat16]
