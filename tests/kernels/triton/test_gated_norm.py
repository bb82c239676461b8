import pytest
import torch
from torch import Tensor

from ssmpretrain.kernels.gated_norm import gated_rms_norm, gated_rms_norm_reference
from ssmpretrain.kernels.gated_norm import triton as gpu
from ssmpretrain.kernels.gated_norm.op import gated_norm_backward_op, gated_norm_op

# Norm of the error over norm of the result. float32: sums over at most 2048 channels in a tree, roundings of 6e-8 each,
# and square roots and sigmoids that a GPU rounds to 2^-22. bfloat16 and float16: results are rounded to 2^-9 or 2^-12.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_inputs(
    device: torch.device, batch: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return x and z as slices of one tensor, as a mixer has them, and a weight."""
    generator = torch.Generator().manual_seed(tokens * channels)
    both = torch.randn(batch, tokens, 2 * channels + 3, generator=generator).to(device, dtype)
    weight = torch.randn(channels, generator=generator).to(device)
    return [both[..., 3 : 3 + channels], both[..., 3 + channels :], weight]


def error(ours: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    return float((ours.detach().cpu().double() - truth).norm() / truth.norm())


def compare(inputs: list[Tensor], groups: int = 1) -> None:
    """Compare the output and every gradient with the float64 reference."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    truths = [t.detach().cpu().double().requires_grad_() for t in inputs]
    out = gated_rms_norm(*leaves, eps=0.1, groups=groups, impl="triton")
    truth = gated_rms_norm_reference(*truths, eps=0.1, groups=groups)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    ours = torch.autograd.grad(out, leaves, grad.to(out.device))
    theirs = torch.autograd.grad(truth, truths, grad.double())
    assert out.dtype == inputs[0].dtype and out.is_contiguous()
    for one, other, like in zip((out, *ours), (truth, *theirs), (inputs[0], *inputs), strict=True):
        assert one.dtype == like.dtype
        assert error(one, other) < TOLERANCES[one.dtype]


@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 7, 70), 1), ((1, 1, 3), 3), ((2, 5, 192), 2), ((1, 2, 2049), 1), ((2, 9, 12), 4)]
)
def test_agrees_with_the_reference_forward_and_backward(
    device: torch.device, shape: tuple[int, int, int], groups: int
) -> None:
    compare(make_inputs(device, *shape), groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    compare(make_inputs(device, 2, 5, 70, dtype))


def test_more_tiles_than_programs_are_walked_through(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(gpu, "TILE", 16)
    compare(make_inputs(device, 3, 5, 14), groups=2)  # 3 x 3 tiles of 2 tokens for the 2 programs of each group


def test_any_strides_are_read(device: torch.device) -> None:
    x, z, weight = make_inputs(device, 2, 5, 12)
    expected = gated_rms_norm(x, z, weight, impl="triton")
    for like in (x.contiguous(), x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(gated_rms_norm(like, z, weight, impl="triton"), expected)
    compare([x, z.mT.contiguous().mT, torch.stack([weight] * 2, -1)[..., 0]])


def test_expanded_gradient_is_read(device: torch.device) -> None:
    inputs = make_inputs(device, 2, 5, 12)
    leaves = [t.detach().requires_grad_() for t in inputs]
    truths = [t.detach().cpu().double().requires_grad_() for t in inputs]
    ours = torch.autograd.grad(gated_rms_norm(*leaves, impl="triton").sum(), leaves)
    theirs = torch.autograd.grad(gated_rms_norm_reference(*truths).sum(), truths)
    assert all(error(a, b) < TOLERANCES[torch.float32] for a, b in zip(ours, theirs, strict=True))


def test_operators_pass_opcheck(device: torch.device) -> None:
    x, z, weight = (t.contiguous() for t in make_inputs(device, 1, 3, 6))
    checks = ("test_schema", "test_faketensor")  # the others trace, as with the native kernels
    torch.library.opcheck(gated_norm_op, (x, z, weight, 1e-5, 2, "triton"), test_utils=checks)
    torch.library.opcheck(gated_norm_backward_op, (x, x, z, weight, 1e-5, 2, "triton"), test_utils=checks)
