from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.causal_conv1d import (
    bidirectional_causal_conv1d,
    bidirectional_causal_conv1d_reference,
    causal_conv1d,
    causal_conv1d_reference,
    centred_conv1d,
    centred_conv1d_reference,
)
from ssmpretrain.kernels.causal_conv1d import triton as gpu
from ssmpretrain.kernels.causal_conv1d.op import causal_conv1d_backward_op, causal_conv1d_op

# Norm of the error over norm of the result. float32: a handful of products, and a SiLU from an exp2 and an rsqrt that a
# GPU rounds to 2^-22. bfloat16 and float16: the output is rounded to 2^-9 or 2^-12, as is the gradient that comes in
# (the interpreter cuts bfloat16 off, to 2^-8).
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_inputs(
    device: torch.device, batch: int, channels: int, tokens: int, taps: int = 4, directions: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """A channel-last x, and weight and bias of one direction or of two."""
    generator = torch.Generator().manual_seed(channels * tokens + taps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    lead = (directions,) if directions == 2 else ()
    return normal(batch, tokens, channels).mT, normal(*lead, channels, taps), normal(*lead, channels)


def leaves_of(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Any]:
    return [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def error(ours: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    scale = truth.norm() if truth.norm() > 0 else torch.ones(())
    return float((ours.detach().cpu().double() - truth).norm() / scale)


def compare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tolerance: float | None = None,
    operation: Any = None,
    reference: Any = None,
    **options: Any,
) -> None:
    """Compare the output and every gradient with the float64 reference."""
    both = weight.ndim == 3
    reference = reference or (bidirectional_causal_conv1d_reference if both else causal_conv1d_reference)
    operation = operation or (bidirectional_causal_conv1d if both else causal_conv1d)
    truth_leaves = leaves_of(*(t if t is None else t.cpu() for t in (x, weight, bias)), dtype=torch.float64)
    truth = reference(*truth_leaves, **options)
    leaves = leaves_of(x, weight, bias)
    out = operation(*leaves, **options, impl="triton")

    # as autograd hands it over: in the output's dtype and strides
    grad = torch.empty_like(out).copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    truth_grads = torch.autograd.grad(truth, [t for t in truth_leaves if t is not None], grad.cpu().double())
    leaves = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, leaves, grad)
    tolerance = TOLERANCES[x.dtype] if tolerance is None else tolerance
    assert out.dtype == x.dtype and out.shape == truth.shape
    assert error(out, truth) < tolerance
    for name, leaf, ours, expected in zip(("x", "weight", "bias"), leaves, grads, truth_grads, strict=False):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape, name
        assert error(ours, expected) < tolerance, name


# batch, channels, tokens, taps; a program has 64 channels and, in tensors this small, at most 16 tokens
SHAPES = [(2, 70, 19, 4), (1, 5, 1, 4), (3, 3, 2, 3), (1, 64, 16, 2), (1, 1, 17, 1), (1, 2, 18, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions_agree_with_the_reference(device: torch.device, shape: tuple[int, ...]) -> None:
    compare(*make_inputs(device, *shape), activation="silu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_one_direction_agrees_with_the_reference(device: torch.device, shape: tuple[int, ...], reverse: bool) -> None:
    compare(*make_inputs(device, *shape, directions=1), activation="silu", reverse=reverse)


@pytest.mark.parametrize("shape", [*SHAPES[:3], (1, 2, 37, 6)], ids=str)  # the last is cut into three spans
def test_centred_convolution_agrees_with_the_reference(device: torch.device, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(device, *shape, directions=1)
    compare(*inputs, activation="silu", operation=centred_conv1d, reference=centred_conv1d_reference)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("directions", [1, 2])
def test_bias_and_activation_may_be_absent(device: torch.device, directions: int, activation: str | None) -> None:
    x, weight, _ = make_inputs(device, 1, 5, 9, directions=directions)
    compare(x, weight, None, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_meet_half_precision_tokens(device: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(device, 1, 5, 20)
    compare(x.to(dtype), weight, bias, activation="silu")
    compare(x.to(dtype), weight.to(dtype), bias.to(dtype), activation="silu")


def test_only_the_result_is_rounded(device: torch.device) -> None:
    # float16 alone: the interpreter cuts bfloat16 off where a GPU rounds
    x, weight, bias = make_inputs(device, 1, 30, 20)
    x = x.half()
    exact = bidirectional_causal_conv1d(x.float(), weight, bias, activation="silu", impl="triton")
    assert torch.equal(bidirectional_causal_conv1d(x, weight, bias, activation="silu", impl="triton"), exact.half())


def test_any_strides_are_read(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 2, 30, 5)
    dense = bidirectional_causal_conv1d(x, weight, bias, impl="triton")
    for strided in (
        x.contiguous(),
        torch.cat([x, x], dim=1)[:, 30:],
        torch.stack([x, x], -1)[..., 1],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x.flip(0)[:1].expand(2, -1, -1),
    ):
        flipped = 1 if strided.stride(0) == 0 else 0  # the expanded one repeats the last sequence
        expected = dense[:, 1:].expand(-1, 2, -1, -1) if flipped else dense
        assert torch.equal(bidirectional_causal_conv1d(strided, weight, bias, impl="triton"), expected)
        compare(strided, weight.mT.contiguous().mT, bias.mT.contiguous().mT, activation="silu")


def test_expanded_gradient_is_read(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 2, 7, 6)
    leaves = leaves_of(x, weight, bias)
    ours = torch.autograd.grad(bidirectional_causal_conv1d(*leaves, impl="triton").sum(), leaves)
    truth_leaves = leaves_of(x.cpu(), weight.cpu(), bias.cpu(), dtype=torch.float64)
    truth = torch.autograd.grad(bidirectional_causal_conv1d_reference(*truth_leaves).sum(), truth_leaves)
    assert all(error(a, b) < TOLERANCES[torch.float32] for a, b in zip(ours, truth, strict=True))


def test_results_have_the_strides_of_x(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 2, 6, 5)
    wide = torch.zeros(2, 5, 12, device=device).mT
    for like in (x, x.contiguous(), x.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, :6]):
        dense = torch.empty_like(like).stride()
        assert causal_conv1d(like, weight[0], bias[0], impl="triton").stride() == dense
        assert bidirectional_causal_conv1d(like, weight, bias, impl="triton").stride() == (60, *dense)
    out = bidirectional_causal_conv1d(wide[:, :6], weight, bias, impl="triton")
    assert out.mT.is_contiguous()  # (2, B, L, E) in memory


def test_fake_tensors_have_the_strides_of_real_ones(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 2, 6, 5)
    for like in (x, x.contiguous()):
        inputs = (like, weight, bias)
        fakes = [tensor.to("meta") for tensor in inputs]
        out, fake = (
            causal_conv1d_op(*inputs, False, False, True, "triton"),
            causal_conv1d_op(*fakes, False, False, True, "triton"),
        )
        grads = causal_conv1d_backward_op(out, *inputs, False, False, True, "triton")
        fake_grads = causal_conv1d_backward_op(fake, *fakes, False, False, True, "triton")
        assert [t.stride() for t in (out, *grads)] == [t.stride() for t in (fake, *fake_grads)]


def test_gradient_of_x_goes_where_it_is_wanted(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 2, 6, 20)
    dout = gpu.forward(x, weight, bias, reverse=False, silu=True)
    dx, dweight, dbias = gpu.backward(dout, x, weight, bias, reverse=False, silu=True)
    wide = torch.full((2, 20, 12), 7.0, device=device)
    half = wide[..., 6:].mT
    given, *others = gpu.backward(dout, x, weight, bias, reverse=False, silu=True, out=half)
    assert given is half and torch.equal(half, dx) and (wide[..., :6] == 7).all()
    assert dbias is not None
    assert all(torch.equal(a, b) for a, b in zip(others, (dweight, dbias), strict=True))


def test_results_do_not_depend_on_the_cut_into_spans(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make_inputs(device, 2, 5, 37)
    dout = gpu.forward(x, weight, bias, reverse=False, silu=True)  # in three spans
    cut = gpu.backward(dout, x, weight, bias, reverse=False, silu=True)
    monkeypatch.setattr(gpu, "ENOUGH_PROGRAMS", 1)
    assert torch.equal(gpu.forward(x, weight, bias, reverse=False, silu=True), dout)
    whole = gpu.backward(dout, x, weight, bias, reverse=False, silu=True)
    assert torch.equal(whole[0], cut[0])
    for ours, expected in zip(whole[1:], cut[1:], strict=True):
        assert ours is not None and expected is not None
        torch.testing.assert_close(ours, expected)  # a sum over tokens in another order


@pytest.mark.gpu
def test_results_are_the_same_bits_on_every_run(device: torch.device) -> None:
    runs = []
    for _ in range(2):
        leaves = leaves_of(*make_inputs(device, 1, 70, 20))
        out = bidirectional_causal_conv1d(*leaves, activation="silu", impl="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_extreme_values_stay_finite(device: torch.device) -> None:
    x, weight, bias = leaves_of(*make_inputs(device, 1, 5, 9))
    out = bidirectional_causal_conv1d(1e4 * x, 1e4 * weight, bias, activation="silu", impl="triton")
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (x, weight, bias)))


def test_autocast_changes_nothing(device: torch.device) -> None:
    x, weight, bias = make_inputs(device, 1, 5, 9)
    expected = bidirectional_causal_conv1d(x, weight, bias, activation="silu", impl="triton")
    with torch.autocast(device.type, torch.bfloat16):
        ours = bidirectional_causal_conv1d(x, weight, bias, activation="silu", impl="triton")
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("directions", "with_bias"), [(1, False), (2, True)])
def test_operators_pass_opcheck(device: torch.device, directions: int, with_bias: bool) -> None:
    x, weight, bias = make_inputs(device, 1, 5, 6)
    weight, bias = weight[:directions], bias[:directions]
    x, weight, biases = leaves_of(x, weight, bias if with_bias else None)
    torch.library.opcheck(causal_conv1d_op, (x, weight, biases, False, False, True, "triton"))
    detached = [None if t is None else t.detach() for t in (x, weight, biases)]
    dout = causal_conv1d_op(*detached, False, False, True, "triton")
    torch.library.opcheck(causal_conv1d_backward_op, (dout, *detached, False, False, True, "triton"))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    inputs = make_inputs(device, 1, 5, 6)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        both = bidirectional_causal_conv1d(x, weight, bias, activation="silu", impl="triton")
        return both.square().mean() + causal_conv1d(x, weight[0], impl="triton").square().mean()

    eager_leaves, leaves = leaves_of(*inputs), leaves_of(*inputs)
    eager, ours = loss(*eager_leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(ours, eager)
    expected = torch.autograd.grad(eager, eager_leaves)
    for theirs, grad in zip(expected, torch.autograd.grad(ours, leaves), strict=True):
        torch.testing.assert_close(grad, theirs)


def test_flops_are_counted(device: torch.device) -> None:
    leaves = leaves_of(*make_inputs(device, 2, 5, 6))
    with FlopCounterMode(display=False) as counter:
        out = bidirectional_causal_conv1d(*leaves, impl="triton")
    assert counter.get_total_flops() == 2 * 2 * (2 * 5 * 6) * 4
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * (2 * 5 * 6) * 4


def test_float64_is_refused(device: torch.device) -> None:
    x, weight, bias = (t.double() for t in make_inputs(device, 1, 5, 6))
    with pytest.raises(ValueError, match=r"^bidirectional_causal_conv1d: impl='triton' computes in float32"):
        bidirectional_causal_conv1d(x, weight, bias, impl="triton")
