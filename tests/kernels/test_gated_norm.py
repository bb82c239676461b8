from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.gated_norm import gated_rms_norm

# Norm of the error over norm of the result. bfloat16 and float16: inputs and outputs are rounded to 2^-9 or 2^-12.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def make_inputs(
    batch: int = 2, tokens: int = 5, channels: int = 12, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return x and z as slices of one tensor, as a mixer has them, and a weight."""
    generator = torch.Generator().manual_seed(channels)
    both = torch.randn(2, tokens, 2 * channels + 3, generator=generator).to(dtype)
    return [both[..., 3 : 3 + channels], both[..., 3 + channels :], torch.randn(channels, generator=generator)]


def loop(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """Compute the norm number by number, in float64."""
    out = torch.empty_like(x)
    size = x.shape[-1] // groups
    for b, t, g in torch.cartesian_prod(*(torch.arange(n) for n in (*x.shape[:2], groups))).tolist():
        group = slice(g * size, (g + 1) * size)
        gated = x[b, t, group] * z[b, t, group] / (1 + torch.exp(-z[b, t, group]))
        out[b, t, group] = gated / (sum(gated**2) / size + eps) ** 0.5 * weight[group]
    return out


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (12, 1), (12, 3), (33, 1), (64, 2)])
def test_values_and_gradients_agree_with_a_loop(channels: int, groups: int, dtype: torch.dtype) -> None:
    leaves = [t.detach().requires_grad_() for t in make_inputs(channels=channels, dtype=dtype)]
    truths = [t.detach().double().requires_grad_() for t in leaves]
    out = gated_rms_norm(*leaves, eps=0.1, groups=groups)
    truth = loop(*truths, 0.1, groups)
    assert out.dtype == dtype and out.is_contiguous()
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(truth, truths, grad.double())
    assert error(out, truth.detach()) < TOLERANCES[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) < 2 * TOLERANCES[dtype]
    assert [g.dtype for g in ours] == [dtype, dtype, torch.float32]


def test_slices_of_one_tensor_are_read_in_place() -> None:
    x, z, weight = make_inputs(tokens=130)
    assert torch.equal(gated_rms_norm(x, z, weight), gated_rms_norm(x.contiguous(), z.contiguous(), weight))
    transposed = gated_rms_norm(x.mT.contiguous().mT, z, weight)
    assert torch.equal(transposed, gated_rms_norm(x, z, weight))


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in make_inputs(tokens=150, channels=40)]
        out = gated_rms_norm(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_a_token_of_zeros_stays_zero_and_large_gates_stay_finite() -> None:
    x, z, weight = (t.clone() for t in make_inputs())
    x[0, 0], z[0, 1] = 0, 1e4
    z[0, 2] = -1e4
    out = gated_rms_norm(x, z, weight)
    assert (out[0, 0] == 0).all() and (out[0, 2].abs() < 1e-30).all() and out.isfinite().all()


def test_operator_compiles_and_knows_its_shapes() -> None:
    inputs = [t.requires_grad_() for t in make_inputs()[2:]]
    x, z = (t.contiguous().requires_grad_() for t in make_inputs()[:2])
    torch.library.opcheck(torch.ops.ssmpretrain.gated_norm.default, (x, z, inputs[0], 1e-5, 1, "native"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"x": t[0][0]}, r"x is \(B, L, D\)"),
        (lambda t: {"z": t[1][:, 1:]}, "z is .* like x"),
        (lambda t: {"z": t[1].bfloat16()}, "z has x's dtype"),
        (lambda t: {"weight": t[2][1:]}, r"weight is \(D,\)"),
        (lambda t: {"eps": 0.0}, "eps is above 0"),
        (lambda t: {"groups": 5}, "groups divides x's D = 12"),
        (lambda t: {"z": None}, "z is a tensor; got None"),
    ],
)
def test_wrong_input_gets_one_clear_message(change: Callable[[list[Tensor]], dict[str, Any]], message: str) -> None:
    inputs = make_inputs()
    arguments = dict(zip(("x", "z", "weight"), inputs, strict=True)) | change(inputs)
    with pytest.raises(UserError, match=f"^gated_rms_norm: {message}"):
        gated_rms_norm(**arguments)
