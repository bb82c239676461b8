"""VMamba2's mixer and block against a loop over the positions of every route."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vmamba2_loop import ROUTES, mixed_by_loop

from ssmpretrain.encoders.vmamba2 import CrossSSDMixer, VMamba2

KINDS = {
    "plain": {},
    "gated": {"gate": True, "conv_bias": True},
    "wide": {"ssm_ratio": 1.5, "head_dim": 6, "d_state": 3},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def mixer(**options) -> CrossSSDMixer:
    """A mixer of 8 channels, none of whose parameters is at its initial value."""
    torch.manual_seed(0)
    made = CrossSSDMixer(8, **{"d_state": 4, "head_dim": 4, **options})
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith(("dt_bias", "A_logs", "Ds")) else 0.5)
    return made.double()


def image(*size: int) -> Tensor:
    return torch.randn(2, *size, 8, dtype=torch.float64)


def close(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@every_kind
@pytest.mark.parametrize("scan", ROUTES, ids=str)
def test_values_and_gradients_are_those_of_a_loop_over_the_routes(options, scan):
    module, x = mixer(scan=scan, **options), image(3, 4).requires_grad_()
    leaves, results = [x, *module.parameters()], []
    grad = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    for y in (module(x), mixed_by_loop(module, x)):
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    close(*results)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (9, 9)])
def test_maps_of_any_size_are_mixed(size):
    """A row of 70 positions and a map of 81 are more than one chunk of 64."""
    module, x = mixer(), image(*size)
    close((module(x),), (mixed_by_loop(module, x),))


@torch.no_grad()
@pytest.mark.parametrize("route", range(4))
@pytest.mark.parametrize("parameter", ["dt_bias", "A_logs", "dt_proj"])
def test_each_route_has_its_own_step_sizes_and_decays(route, parameter):
    module, x = mixer(), image(3, 4)
    before = module(x)
    if parameter == "dt_proj":
        module.dt_proj.weight[2 * route : 2 * route + 2] += 1  # the two heads of a route
    else:
        getattr(module, parameter)[route] += 1
    after = module(x)
    assert (after - before).abs().max() > 1e-3
    close((after,), (mixed_by_loop(module, x),))


@torch.no_grad()
@pytest.mark.parametrize("mlp_ratio", [0, 4])
def test_a_block_adds_its_branches_to_the_stream(mlp_ratio):
    model = VMamba2(embed_dim=8, depths=(1,), d_state=4, head_dim=4, mlp_ratio=mlp_ratio, num_classes=0).double()
    block, x = model.layers[0].blocks[0], image(3, 4)
    expected = x + mixed_by_loop(block.op, block.norm(x))
    if mlp_ratio:
        expected = expected + block.mlp(block.norm2(expected))
    close((block(x.clone()),), (expected,))


@torch.no_grad()
@every_kind
def test_float32_and_bfloat16_are_close_to_float64(options):
    module, x = mixer(**options), image(5, 7)
    exact = module(x)
    single = module.float()(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x.float())
    low = module.bfloat16()(x.bfloat16())
    assert (single.dtype, mixed.dtype, low.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    # Some roundings of 6e-8, and some of 4e-3, in a row.
    assert (single - exact).norm() / exact.norm() < 1e-6
    for answer in (mixed, low):
        assert (answer - exact).norm() / exact.norm() < 3e-2


@torch.no_grad()
def test_large_step_sizes_stay_finite_in_bfloat16():
    module = mixer().float()
    module.dt_bias.fill_(50.0)
    module.A_logs.fill_(5.0)
    answer = module.bfloat16()(image(9, 9).bfloat16())
    assert answer.isfinite().all()


def test_initial_values_are_those_of_mamba_2():
    torch.manual_seed(0)
    module = VMamba2(embed_dim=512, depths=(1,), head_dim=8, num_classes=0).mixer
    A, steps = module.A_logs.detach().exp(), F.softplus(module.dt_bias.detach())
    assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, abs=1)
    assert steps.min() > 9.9e-4 and steps.max() < 0.101
    assert steps.log().mean().exp().item() == pytest.approx(0.01, rel=0.3)
    assert torch.equal(module.Ds, torch.ones(64))
    assert module.A_logs.shape == module.dt_bias.shape == (4, 64)


def test_heads_that_do_not_fill_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"VMamba2: head_dim divides the inner channels of every stage; got 3 for 8\."):
        CrossSSDMixer(8, head_dim=3)
