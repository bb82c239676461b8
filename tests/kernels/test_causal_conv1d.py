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
from ssmpretrain.kernels.causal_conv1d.op import causal_conv1d_backward_op, causal_conv1d_op
from ssmpretrain.kernels.native import library

needs_library = pytest.mark.skipif(library.load() is None, reason="needs a C++ compiler")

# Norm of the error over norm of the result: a handful of float32 products. bfloat16 and float16: the result is rounded
# to 2^-9 or 2^-12, and nothing else is.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_inputs(batch: int, channels: int, tokens: int, taps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A channel-last x, and weights and biases of two directions."""
    generator = torch.Generator().manual_seed(channels * tokens + taps)
    x = torch.randn(batch, tokens, channels, generator=generator).mT
    return x, torch.randn(2, channels, taps, generator=generator), torch.randn(2, channels, generator=generator)


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, centred: bool = False) -> Tensor:
    """The definition, one product at a time, float64."""
    x, weight = x.double(), weight.double()
    tokens, taps = x.shape[2], weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(tokens):
        for w in range(taps):
            distance = taps // 2 - w if centred else taps - 1 - w
            s = t + distance if reverse else t - distance
            if 0 <= s < tokens:
                y[..., t] += weight[:, w] * x[..., s]
    return y if bias is None else y + bias.double().unsqueeze(-1)


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("reverse", [False, True])
def test_agrees_with_a_loop(reverse: bool, dtype: torch.dtype) -> None:
    for shape in ((2, 5, 9, 4), (1, 3, 1, 4), (2, 1, 7, 1), (1, 4, 3, 6)):
        x, weights, biases = make_inputs(*shape)
        x = x.to(dtype)
        truth = loop(x, weights[0], biases[0], reverse)
        ours = causal_conv1d(x, weights[0], biases[0], reverse=reverse)
        assert ours.dtype == dtype and error(ours, truth) < TOLERANCES[dtype], shape
        gated = causal_conv1d(x, weights[0], biases[0], reverse=reverse, activation="silu")
        assert error(gated, truth * truth.sigmoid()) < TOLERANCES[dtype], shape
        bare = causal_conv1d(x, weights[0], reverse=reverse)
        assert error(bare, loop(x, weights[0], None, reverse)) < TOLERANCES[dtype], shape


@pytest.mark.parametrize("activation", [None, "silu"])
def test_both_directions_are_one_causal_and_one_anticausal(activation: Any) -> None:
    x, weights, biases = make_inputs(2, 5, 9)
    causal, anticausal = bidirectional_causal_conv1d(x, weights, biases, activation=activation)
    assert torch.equal(causal, causal_conv1d(x, weights[0], biases[0], activation=activation))
    assert torch.equal(anticausal, causal_conv1d(x, weights[1], biases[1], activation=activation, reverse=True))
    causal, _ = bidirectional_causal_conv1d(x, weights, activation=activation)
    assert torch.equal(causal, causal_conv1d(x, weights[0], activation=activation))


def test_reverse_is_the_flipped_convolution_of_flipped_tokens() -> None:
    x, weights, biases = make_inputs(2, 5, 9)
    expected = causal_conv1d(x.flip(-1), weights[0], biases[0]).flip(-1)
    torch.testing.assert_close(causal_conv1d(x, weights[0], biases[0], reverse=True), expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_centred_convolution_agrees_with_a_loop(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 9, 4), (1, 3, 1, 4), (2, 1, 7, 1), (1, 4, 3, 6), (1, 20, 70, 3)):
        x, weights, biases = make_inputs(*shape)
        x = x.to(dtype)
        truth = loop(x, weights[0], biases[0], reverse=False, centred=True)
        ours = centred_conv1d(x, weights[0], biases[0], activation="silu")
        assert ours.dtype == dtype and error(ours, truth * truth.sigmoid()) < TOLERANCES[dtype], shape
        bare = centred_conv1d(x, weights[0])
        assert error(bare, loop(x, weights[0], None, reverse=False, centred=True)) < TOLERANCES[dtype], shape


FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "causal": (causal_conv1d, causal_conv1d_reference, {}),
    "anti-causal": (causal_conv1d, causal_conv1d_reference, {"reverse": True}),
    "centred": (centred_conv1d, centred_conv1d_reference, {}),
    "both": (bidirectional_causal_conv1d, bidirectional_causal_conv1d_reference, {}),
}


def gradients(function: Any, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and the gradients of all leaves, for a random gradient of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@needs_library
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("form", FORMS)
def test_native_gradients_agree_with_the_reference(form: str, activation: Any) -> None:
    ours, reference, options = FORMS[form]
    # more than one work item of 64 tokens and 64 channels; a last block of channels that is not full
    for shape in ((2, 70, 130, 4), (3, 5, 1, 4), (1, 16, 64, 3), (1, 3, 2, 6), (2, 1, 65, 1)):
        x, weights, biases = make_inputs(*shape)
        leaves = [x, weights, biases] if form == "both" else [x, weights[0], biases[0]]
        for dtype in (torch.float32, torch.bfloat16):
            given = [leaves[0].to(dtype), *leaves[1:]]
            exact = [leaf.double() for leaf in given]
            found = gradients(ours, given, activation=activation, **options)
            # the gradient that comes in is rounded too
            tolerance = 2e-6 if dtype == torch.float32 else 4e-3
            for a, b in zip(found, gradients(reference, exact, activation=activation, **options), strict=True):
                assert error(a, b) < tolerance or (a.double() - b).norm() < tolerance, (form, shape, dtype)


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_native_kernel_reads_any_strides(form: str) -> None:
    ours, _, options = FORMS[form]
    x, weights, biases = make_inputs(2, 36, 21)
    leaves = [weights, biases] if form == "both" else [weights[0], biases[0]]
    dense = gradients(ours, [x, *leaves], activation="silu", **options)
    wide = torch.randn(2, 21, 80).mT
    wide[:, 7:43] = x
    for like in (x.contiguous(), wide[:, 7:43], torch.stack([x, x], -1)[..., 1], x.permute(2, 0, 1).contiguous()):
        like = like.permute(1, 2, 0) if like.shape[0] == 21 else like
        strided = [leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf for leaf in leaves]
        for a, b in zip(gradients(ours, [like, *strided], activation="silu", **options), dense, strict=True):
            assert torch.equal(a, b)
    by_sum = [leaf.detach().requires_grad_() for leaf in (x, *leaves)]
    expanded = torch.autograd.grad(ours(*by_sum, **options).sum(), by_sum)  # the gradient has strides 0
    ones = [leaf.detach().requires_grad_() for leaf in (x, *leaves)]
    out = ours(*ones, **options)
    for a, b in zip(expanded, torch.autograd.grad(out, ones, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


@needs_library
def test_native_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weights, biases = make_inputs(3, 70, 130)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(gradients(bidirectional_causal_conv1d, [x, weights, biases], activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_library
def test_native_operators_pass_opcheck() -> None:
    x, weights, biases = make_inputs(1, 5, 6)
    for like in (x, x.contiguous()):
        leaves = [leaf.detach().requires_grad_() for leaf in (like, weights[:1], biases[:1])]
        torch.library.opcheck(causal_conv1d_op, (*leaves, False, True, True, "native"))
        inputs = (like, weights, None, False, False, True, "native")
        torch.library.opcheck(causal_conv1d_backward_op, (causal_conv1d_op(*inputs), *inputs))


@pytest.mark.parametrize("form", FORMS)
def test_passes_gradcheck(form: str) -> None:
    operation, _, options = FORMS[form]
    x, weights, biases = (t.double().requires_grad_() for t in make_inputs(2, 2, 5, 3))

    def run(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        parameters = (weights, biases) if form == "both" else (weights[0], biases[0])
        result: Tensor = operation(x, *parameters, activation="silu", **options)
        return result

    assert torch.autograd.gradcheck(run, (x, weights, biases), fast_mode=True)


def test_every_gradient_has_its_inputs_dtype() -> None:
    x, weights, biases = make_inputs(2, 5, 9)
    leaves = [x.bfloat16().requires_grad_(), weights.requires_grad_(), biases.half().requires_grad_()]
    grads = torch.autograd.grad(bidirectional_causal_conv1d(*leaves, activation="silu").sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float16]


def test_autocast_changes_nothing() -> None:
    x, weights, biases = make_inputs(2, 5, 9)
    one, both = causal_conv1d(x, weights[0], biases[0]), bidirectional_causal_conv1d(x, weights, biases)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_conv1d(x, weights[0], biases[0]), one)
        assert torch.equal(bidirectional_causal_conv1d(x, weights, biases), both)


def test_results_have_the_strides_of_x() -> None:
    x, weights, biases = make_inputs(2, 6, 5)
    wide = torch.zeros(2, 5, 12).mT
    for like in (x, x.contiguous(), x.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, :6]):
        dense = torch.empty_like(like).stride()
        assert causal_conv1d(like, weights[0], biases[0]).stride() == dense
        assert bidirectional_causal_conv1d(like, weights, biases).stride() == (60, *dense)


def test_compiles_without_graph_breaks() -> None:
    x, weights, biases = make_inputs(2, 5, 9)

    def run(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        one = causal_conv1d(x, weights[0], biases[0], activation="silu")
        return one + bidirectional_causal_conv1d(x, weights, biases, activation="silu").sum(0)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights, biases), run(x, weights, biases))


def test_flops_are_those_of_the_convolution() -> None:
    x, weights, biases = make_inputs(2, 5, 9)
    with FlopCounterMode(display=False) as counter:
        bidirectional_causal_conv1d(x, weights, biases, activation="silu")
    assert counter.get_total_flops() == 2 * 2 * x.numel() * 4  # what the kernel's formula says too


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 9), r"x is \(B, E, L\), none but B 0; got \(5, 9\)"),
        ("x", torch.zeros(2, 5, 0), r"x is \(B, E, L\), none but B 0; got \(2, 5, 0\)"),
        ("x", torch.zeros(2, 5, 9).long(), "x is float32, bfloat16 or float16; got torch.int64"),
        ("x", torch.zeros(2, 5, 9).double(), "with a float64 x every input is float64; got weight"),
        (
            "weight",
            torch.zeros(4, 3),
            r"weights? is \((2, )?E, W\) with x's E = 5 and W .*; got \((2, )?4, 3\)",
        ),
        ("weight", torch.zeros(5, 0), r"weights? is \((2, )?E, W\) .*; got \((2, )?5, 0\)"),
        ("weight", torch.zeros(5), r"weights? is \((2, )?E, W\) .*; got \((2, )?5,?\)"),
        ("weight", torch.zeros(5, 3).int(), "weights? is float32, bfloat16 or float16; got torch.int32"),
        ("bias", torch.zeros(4), r"bias(es)? is \((2, )?E,?\) with x's E = 5; got \((2, )?4,?\)"),
        ("bias", torch.zeros(5, device="meta"), "all tensors are on one device; got x on cpu and bias(es)? on meta"),
        ("activation", "gelu", "activation is 'silu' or None; got 'gelu'"),
        ("impl", "cuda", "impl is one of auto, reference, cpu, triton; got 'cuda'"),
        ("impl", "triton", "impl='triton' takes CUDA tensors; got cpu"),
    ],
)
def test_bad_input_is_named(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 5, 9), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)}
    arguments[name] = value
    for operation in (causal_conv1d, centred_conv1d):
        with pytest.raises(ValueError, match=f"^{operation.__name__}: .*{message}"):
            operation(**arguments)
    for one, both in (("weight", "weights"), ("bias", "biases")):
        tensor = arguments.pop(one)
        arguments[both] = torch.stack([tensor, tensor])
    with pytest.raises(ValueError, match=f"^bidirectional_causal_conv1d: .*{message}"):
        bidirectional_causal_conv1d(**arguments)
