from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.add_norm import add_norm, add_norm_reference

# Norm of the error over norm of the result: float32 sums over the channels. bfloat16 and float16: the normed tokens are
# rounded to 2^-9 or 2^-12, and nothing else is.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_inputs(batch: int = 2, tokens: int = 5, channels: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens * channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": 0.5 + normal(batch, tokens, channels),
        "residual": normal(batch, tokens, channels),
        "weight": normal(channels),
        "bias": normal(channels),
        "drop_path_scale": torch.tensor([1.25, 0.0])[:batch],
    }


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_agrees_with_a_loop_over_tokens(norm: Any, dtype: torch.dtype) -> None:
    inputs = make_inputs()
    inputs["x"] = inputs["x"].to(dtype)
    normed, total = add_norm(**inputs, norm=norm, eps=0.1)
    assert normed.dtype == dtype and total.dtype == torch.float32
    x, residual, weight, bias, scale = (tensor.double() for tensor in inputs.values())
    for b in range(2):
        for t in range(5):
            h = residual[b, t] + scale[b] * x[b, t]
            assert error(total[b, t], h) < TOLERANCES[torch.float32]
            centred = h - sum(h) / 7 if norm == "layer" else h
            deviation = (sum(centred**2) / 7 + 0.1) ** 0.5
            assert error(normed[b, t], centred / deviation * weight + bias) < TOLERANCES[dtype]


def test_dropped_branch_leaves_the_stream_and_gets_no_gradient() -> None:
    inputs = make_inputs()
    inputs["x"].requires_grad_()
    normed, total = add_norm(**inputs)
    assert torch.equal(total[1], inputs["residual"][1])
    (grad,) = torch.autograd.grad(normed.sum() + total.sum(), inputs["x"])
    assert (grad[1] == 0).all() and (grad[0] != 0).all()


def test_first_block_has_no_stream_yet() -> None:
    inputs: dict[str, Any] = make_inputs() | {"residual": None, "drop_path_scale": None}
    normed, total = add_norm(**inputs, norm="layer")
    assert torch.equal(total, inputs["x"]) and total.data_ptr() != inputs["x"].data_ptr()
    assert torch.equal(normed, F.layer_norm(inputs["x"], (7,), inputs["weight"], inputs["bias"]))


def test_the_cpu_runs_the_reference() -> None:
    inputs = make_inputs()
    expected = add_norm_reference(**inputs)
    for impl in ("auto", "cpu", "reference"):
        ours = add_norm(**inputs, impl=impl)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_passes_gradcheck(norm: Any) -> None:
    *leaves, scale = (tensor.double() for tensor in make_inputs(2, 2, 4).values())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        lambda *tensors: add_norm(*tensors, norm=norm, drop_path_scale=scale), leaves, fast_mode=True
    )


def test_every_gradient_has_its_inputs_dtype() -> None:
    inputs = make_inputs()
    inputs["x"], inputs["bias"] = inputs["x"].bfloat16(), inputs["bias"].half()
    leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name != "drop_path_scale"]
    grads = torch.autograd.grad(add_norm(**inputs)[0].sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32, torch.float16]


def test_drop_path_scale_gets_no_gradient() -> None:
    inputs = make_inputs()
    inputs["drop_path_scale"].requires_grad_()
    assert not any(out.requires_grad for out in add_norm(**inputs))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_autocast_changes_nothing(norm: Any) -> None:
    inputs = make_inputs()
    inputs["x"] = inputs["x"].bfloat16()
    expected = add_norm(**inputs, norm=norm)
    with torch.autocast("cpu", torch.float16):
        ours = add_norm(**inputs, norm=norm)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_out_dtype_rounds_the_normed_tokens_alone() -> None:
    inputs = make_inputs()
    expected, stream = add_norm(**inputs)
    normed, total = add_norm(**inputs, out_dtype=torch.bfloat16)
    assert torch.equal(normed, expected.bfloat16()) and torch.equal(total, stream)


def test_results_are_contiguous() -> None:
    inputs = make_inputs()
    inputs["x"], inputs["residual"] = inputs["x"].mT.contiguous().mT, inputs["residual"].mT.contiguous().mT
    assert all(out.is_contiguous() for out in add_norm(**inputs))


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs()
    compiled = torch.compile(add_norm, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(**inputs), add_norm(**inputs), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 7), r"x is \(B, L, D\), none but B 0; got \(5, 7\)"),
        ("x", torch.zeros(2, 0, 7), r"x is \(B, L, D\), none but B 0; got \(2, 0, 7\)"),
        ("x", torch.zeros(2, 5, 7).long(), "x is float32, bfloat16 or float16; got torch.int64"),
        ("x", torch.zeros(2, 5, 7).double(), "with a float64 x every input is float64; got residual"),
        ("residual", torch.zeros(2, 5, 6), r"residual is \(B, L, D\) like x, \(2, 5, 7\); got \(2, 5, 6\)"),
        ("residual", torch.zeros(2, 5, 7, device="meta"), "got x on cpu and residual on meta"),
        ("weight", torch.zeros(6), r"weight is \(D,\) with x's D = 7; got \(6,\)"),
        ("weight", torch.zeros(7).int(), "weight is float32, bfloat16 or float16; got torch.int32"),
        ("bias", torch.zeros(1, 7), r"bias is \(D,\) with x's D = 7; got \(1, 7\)"),
        ("drop_path_scale", torch.zeros(2, 1, 1), r"drop_path_scale is \(B,\) with x's B = 2; got \(2, 1, 1\)"),
        ("drop_path_scale", torch.zeros(2).half(), "drop_path_scale is float32; got torch.float16"),
        ("norm", "batch", "norm is one of rms, layer; got 'batch'"),
        ("eps", 0.0, "eps is above 0 and finite, .*; got 0.0"),
        ("out_dtype", torch.int8, "out_dtype is float32, bfloat16 or float16; got torch.int8"),
        ("impl", "cuda", "impl is one of auto, reference, cpu, triton; got 'cuda'"),
        ("impl", "triton", "impl='triton' takes CUDA tensors; got cpu"),
    ],
)
def test_bad_input_is_named(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = make_inputs() | {name: value}
    with pytest.raises(ValueError, match=f"^add_norm: .*{message}"):
        add_norm(**arguments)
