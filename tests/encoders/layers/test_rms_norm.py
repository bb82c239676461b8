import pytest
import torch
from torch import nn

from ssmpretrain.encoders.layers.rms_norm import RMSNorm, rms_norm_linear


def layers(dim: int = 8, outputs: int = 5, dtype: torch.dtype = torch.float32) -> tuple[RMSNorm, nn.Linear]:
    torch.manual_seed(0)
    norm = RMSNorm(dim).to(dtype)
    nn.init.normal_(norm.weight)
    return norm, nn.Linear(dim, outputs, bias=False, dtype=dtype)


def test_the_norm_divides_by_the_root_mean_square():
    norm, _ = layers()
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


def test_a_token_of_zeros_has_a_finite_norm_and_gradient():
    norm, linear = layers()
    for function in (norm, lambda x: rms_norm_linear(x, norm, linear)):
        x = torch.zeros(1, 2, 8, requires_grad=True)
        y = function(x)
        y.sum().backward()
        assert not y.any()
        assert x.grad.isfinite().all()


def test_the_joined_pass_is_the_two_layers():
    norm, linear = layers()
    x = torch.randn(2, 3, 8)
    expected = linear(norm(x))
    torch.testing.assert_close(rms_norm_linear(x, norm, linear), expected)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm_linear(x, norm, linear), expected)


def test_the_joined_pass_has_the_right_gradients():
    norm, linear = layers(dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def function(x, norm_weight, weight):
        return torch.func.functional_call(
            Joined(norm, linear), {"norm.weight": norm_weight, "linear.weight": weight}, x
        )

    assert torch.autograd.gradcheck(function, (x, norm.weight, linear.weight))


def test_the_joined_pass_has_second_derivatives():
    norm, linear = layers(dtype=torch.float64)
    x = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    norm.weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm_linear_of(x, norm, w), (x, linear.weight))


def test_the_joined_pass_keeps_no_copy_of_the_normed_tokens():
    norm, linear = layers()
    x = torch.randn(2, 30, 8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm_linear(x, norm, linear)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_the_norm_is_float32_and_the_projection_bfloat16(grad):
    norm, linear = layers()
    x = torch.randn(2, 3, 8)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        y = rms_norm_linear(x, norm, linear)
        assert torch.equal(y, linear(norm(x)))
    assert y.dtype == torch.bfloat16
    if grad:
        y.sum().backward()
        assert linear.weight.grad.dtype == norm.weight.grad.dtype == torch.float32


def rms_norm_linear_of(x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return torch.func.functional_call(Joined(norm, linear), {"linear.weight": weight}, x)


class Joined(nn.Module):
    def __init__(self, norm: RMSNorm, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_linear(x, self.norm, self.linear)
