from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.add_norm import add_norm, add_norm_reference
from ssmpretrain.kernels.add_norm import triton as gpu
from ssmpretrain.kernels.add_norm.op import add_norm_backward_op, add_norm_op

# Norm of the error over norm of the result. float32: sums over at most 2048 channels in a tree, roundings of 6e-8 each,
# and an rsqrt that a GPU rounds to 2^-22. bfloat16 and float16: normed tokens and the gradient of x are rounded to 2^-9
# or 2^-12 (the interpreter cuts bfloat16 off, to 2^-8).
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INPUTS = ("x", "residual", "weight", "bias")


def make_inputs(device: torch.device, batch: int, tokens: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens * channels)
    shapes = ((batch, tokens, channels), (batch, tokens, channels), (channels,), (channels,))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in zip(INPUTS, shapes, strict=True)}
    inputs["x"] += 0.5  # so that a mean has something to take off
    inputs["drop_path_scale"] = torch.tensor([1.25, 0.0, 1.25])[:batch]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def leaves_of(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    leaves = {}
    for name, tensor in inputs.items():
        leaves[name] = None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
        if name in INPUTS and tensor is not None:
            leaves[name].requires_grad_()
    return leaves


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Any], grads: list[Tensor]) -> dict[str, Tensor]:
    names = [name for name in INPUTS if leaves[name] is not None]
    return dict(zip(names, torch.autograd.grad(outputs, [leaves[name] for name in names], grads), strict=True))


def error(ours: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    scale = truth.norm() if truth.norm() > 0 else torch.ones(())
    return float((ours.detach().cpu().double() - truth).norm() / scale)


def compare(inputs: dict[str, Any], **options: Any) -> None:
    """Compare both outputs and every gradient with the float64 reference."""
    cpu = {name: None if tensor is None else tensor.cpu() for name, tensor in inputs.items()}
    truth_leaves, leaves = leaves_of(cpu, torch.float64), leaves_of(inputs)
    truth_options = {name: value for name, value in options.items() if name != "out_dtype"}
    truth = add_norm_reference(**truth_leaves, **truth_options)
    ours = add_norm(**leaves, **options, impl="triton")
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in ours]
    truth_grads = gradients(truth, truth_leaves, [grad.double() for grad in grads])
    our_grads = gradients(ours, leaves, [grad.to(inputs["x"].device) for grad in grads])

    normed, total = ours
    assert normed.dtype == options.get("out_dtype", inputs["x"].dtype) and total.dtype == torch.float32
    assert normed.is_contiguous() and total.is_contiguous()
    assert error(total, truth[1]) < TOLERANCES[torch.float32]
    tolerance = max(TOLERANCES[normed.dtype], TOLERANCES[inputs["x"].dtype])
    assert error(normed, truth[0]) < tolerance
    for name, grad in our_grads.items():
        assert grad.dtype == leaves[name].dtype and grad.shape == leaves[name].shape, name
        assert error(grad, truth_grads[name]) < max(tolerance, TOLERANCES[grad.dtype]), name


SHAPES = [(3, 7, 70), (1, 1, 3), (2, 5, 192), (1, 2, 2049), (2, 9, 3), (3, 1, 16)]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_forward_and_backward(
    device: torch.device, shape: tuple[int, ...], norm: str
) -> None:
    compare(make_inputs(device, *shape), norm=norm)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("absent", ["residual", "bias", "drop_path_scale"])
def test_optional_inputs_may_be_absent(device: torch.device, absent: str, norm: str) -> None:
    compare(make_inputs(device, 2, 5, 12) | {absent: None}, norm=norm, eps=1e-3)


def test_weight_alone_is_enough(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    compare(inputs | {"residual": None, "bias": None, "drop_path_scale": None})


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_stream_and_parameters_meet_half_precision_branches(
    device: torch.device, dtype: torch.dtype, norm: str
) -> None:
    inputs = make_inputs(device, 2, 5, 70)
    inputs["x"] = inputs["x"].to(dtype)
    compare(inputs, norm=norm)
    compare(inputs | {"weight": inputs["weight"].to(dtype), "bias": inputs["bias"].to(dtype)}, norm=norm)


def test_dtypes_of_stream_and_result_may_be_chosen(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    compare(inputs, out_dtype=torch.float16)
    inputs["residual"] = inputs["residual"].half()
    compare(inputs | {"x": inputs["x"].half()}, out_dtype=torch.float32)


def test_more_tiles_than_programs_are_walked_through(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(gpu, "TILE", 16)
    compare(make_inputs(device, 3, 5, 7), norm="layer")  # 3 x 3 tiles of 2 tokens


def test_any_strides_are_read(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    expected = add_norm(**inputs, impl="triton")
    for strided in (
        lambda t: torch.cat([t, t], -1)[..., 12:],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 1],
    ):
        inputs["x"], inputs["residual"] = strided(inputs["x"]), strided(inputs["residual"])
        assert all(torch.equal(a, b) for a, b in zip(add_norm(**inputs, impl="triton"), expected, strict=True))
    inputs["weight"] = torch.stack([inputs["weight"]] * 2, -1)[..., 0]
    inputs["drop_path_scale"] = torch.stack([inputs["drop_path_scale"]] * 2, -1)[..., 0]
    compare(inputs)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_be_unused_and_its_gradient_expanded(device: torch.device, used: int) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    leaves = leaves_of(inputs)
    truth_leaves = leaves_of({name: tensor.cpu() for name, tensor in inputs.items()}, torch.float64)
    ours, truth = add_norm(**leaves, impl="triton")[used], add_norm_reference(**truth_leaves)[used]
    for name in INPUTS[: 4 if used == 0 else 2]:
        (grad,) = torch.autograd.grad(ours.sum(), leaves[name], retain_graph=True)
        (expected,) = torch.autograd.grad(truth.sum(), truth_leaves[name], retain_graph=True)
        assert error(grad, expected) < TOLERANCES[torch.float32], name


@pytest.mark.gpu
def test_results_are_the_same_bits_on_every_run(device: torch.device) -> None:
    runs = []
    for _ in range(2):
        leaves = leaves_of(make_inputs(device, 3, 5, 70))
        outputs = add_norm(**leaves, norm="layer", impl="triton")
        grads = gradients(outputs, leaves, [out.detach() for out in outputs])
        runs.append([*outputs, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_constant_tokens_stay_finite(device: torch.device, norm: str) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    for value in (0.0, 1e4):
        inputs["x"], inputs["residual"] = (torch.full_like(inputs["x"], value) for _ in range(2))
        leaves = leaves_of(inputs)
        outputs = add_norm(**leaves, norm=norm, impl="triton")  # type: ignore[arg-type]
        assert all(out.isfinite().all() for out in outputs)
        grads = gradients(outputs, leaves, [torch.ones_like(out) for out in outputs])
        assert all(grad.isfinite().all() for grad in grads.values())


def test_autocast_changes_nothing(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    expected = add_norm(**inputs, impl="triton")
    with torch.autocast(device.type, torch.bfloat16):
        ours = add_norm(**inputs, impl="triton")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("absent", [(), ("residual", "bias", "drop_path_scale")])
def test_operators_pass_opcheck(device: torch.device, absent: tuple[str, ...]) -> None:
    inputs = leaves_of(make_inputs(device, 2, 3, 5) | dict.fromkeys(absent))
    layer = not absent
    torch.library.opcheck(add_norm_op, (*inputs.values(), layer, 1e-5, torch.bfloat16))
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in inputs.items()}
    normed, *saved = add_norm_op(*detached.values(), layer, 1e-5, torch.bfloat16)
    if absent:  # the sum is x, and not returned once more
        assert saved[0].numel() == 0
        saved[0] = detached["x"]
    residual_dtype = None if absent else torch.float32
    parameters = (detached["weight"], detached["bias"], detached["drop_path_scale"])
    arguments = (normed, None if absent else saved[0], *saved, *parameters, layer, torch.float16, residual_dtype)
    torch.library.opcheck(add_norm_backward_op, arguments)


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 3, 5)

    def loss(inputs: dict[str, Any]) -> Tensor:
        normed, total = add_norm(**inputs, norm="layer", impl="triton")
        return normed.square().mean() + total.mean()

    eager_leaves, leaves = leaves_of(inputs), leaves_of(inputs)
    eager, ours = loss(eager_leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves)
    torch.testing.assert_close(ours, eager)
    eager.backward()  # type: ignore[no-untyped-call]
    ours.backward()
    for name in INPUTS:
        torch.testing.assert_close(leaves[name].grad, eager_leaves[name].grad)


def test_flops_are_counted(device: torch.device) -> None:
    leaves = leaves_of(make_inputs(device, 2, 3, 5))
    with FlopCounterMode(display=False) as counter:
        normed, _ = add_norm(**leaves, impl="triton")
    assert counter.get_total_flops() == 6 * 2 * 3 * 5
    with FlopCounterMode(display=False) as counter:
        normed.sum().backward()
    assert counter.get_total_flops() == 11 * 2 * 3 * 5


def test_float64_is_refused(device: torch.device) -> None:
    inputs = {name: tensor.double() for name, tensor in make_inputs(device, 1, 3, 5).items()}
    with pytest.raises(ValueError, match=r"^add_norm: impl='triton' computes in float32; got float64"):
        add_norm(**inputs, impl="triton")
