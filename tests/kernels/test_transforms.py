"""Forward mode, the transforms of torch.func and second derivatives: the right number or one sentence."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.cross_scan import cross_selective_scan
from ssmpretrain.kernels.selective_scan import selective_scan
from ssmpretrain.kernels.ssd import bidirectional_ssd, cross_ssd, ssd

# B batch, E channels, L = H W tokens, N state, R rank of the step size
BATCH, CHANNELS, SIDE, STATE, RANK = 2, 3, 3, 2, 1
Scan = Callable[..., Tensor]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums of some hundred products in another order, cubed


def draw(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DELTA, ROWS, A, D = (draw(CHANNELS, SIDE**2), draw(1, STATE, SIDE**2), -draw(CHANNELS, STATE).exp(), draw(CHANNELS))
DIRECTION = ScanDirection(
    draw(CHANNELS, 4), draw(CHANNELS), draw(RANK + 2 * STATE, CHANNELS), draw(CHANNELS, RANK), draw(CHANNELS), A, D
)
ROUTES = (
    *(draw(4, RANK + 2, CHANNELS), draw(4, CHANNELS, RANK), draw(4, CHANNELS)),
    *(-draw(4, CHANNELS, 1).exp(), draw(4, CHANNELS)),
)


def one_scan(x: Tensor, impl: str = "auto") -> Tensor:
    rows = ROWS.expand(len(x), -1, -1)
    return selective_scan(x, DELTA.expand(x.shape), A, rows, rows, D, x, None, True, impl=impl)


def two_directions(x: Tensor, impl: str = "auto") -> Tensor:
    return bidirectional_scan(torch.cat([x, x], 1).mT, DIRECTION, DIRECTION, impl=impl).mT


def four_routes(x: Tensor, impl: str = "auto") -> Tensor:
    return cross_selective_scan(x.unflatten(2, (SIDE, SIDE)), *ROUTES, impl=impl).flatten(2)


STEP, DECAY = (draw(1, SIDE**2, 1).abs(), -draw(1).exp())  # of one head of all channels


def duality(x: Tensor, impl: str = "auto") -> Tensor:
    rows = ROWS.mT.unsqueeze(2).expand(len(x), -1, -1, -1)
    heads = x.mT.unsqueeze(2)
    step = STEP.expand(len(x), -1, -1)
    return bidirectional_ssd(heads, step, DECAY, rows, rows, DECAY, heads, impl=impl).squeeze(2).mT


@pytest.fixture(params=[one_scan, two_directions, four_routes, duality])
def scan(request: pytest.FixtureRequest) -> Scan:
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, CHANNELS, SIDE**2)


@pytest.fixture
def tangent() -> Tensor:
    return torch.randn(BATCH, CHANNELS, SIDE**2)


def slope(scan: Scan, x: Tensor, tangent: Tensor) -> Tensor:
    """The directional derivative of the reference, by reverse mode alone."""
    x = x.clone().requires_grad_()
    v = torch.zeros_like(x, requires_grad=True)
    (pulled,) = torch.autograd.grad(scan(x, "reference"), x, v, create_graph=True)
    return torch.autograd.grad(pulled, v, tangent)[0]


def cubes(scan: Scan, impl: str = "auto") -> Callable[[Tensor], Tensor]:
    return lambda x: scan(x, impl).pow(3).sum()


def test_jvp_is_the_directional_derivative(scan: Scan, x: Tensor, tangent: Tensor) -> None:
    _, given = torch.func.jvp(scan, (x,), (tangent,))
    torch.testing.assert_close(given, slope(scan, x, tangent), **TOLERANCE)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_keep_their_tangent(scan: Scan, x: Tensor, tangent: Tensor, requires_grad: bool) -> None:
    with forward_ad.dual_level():
        y = scan(forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent))
        given = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(given, slope(scan, x, tangent), **TOLERANCE)


def test_compiled_jvp_is_the_directional_derivative(x: Tensor, tangent: Tensor) -> None:
    def run(x: Tensor, tangent: Tensor) -> Tensor:
        return torch.func.jvp(one_scan, (x,), (tangent,))[1]

    given = torch.compile(run, backend="eager")(x, tangent)
    torch.testing.assert_close(given, slope(one_scan, x, tangent), **TOLERANCE)


def test_gradients_by_torch_func_are_those_of_backward(scan: Scan, x: Tensor) -> None:
    x.requires_grad_()
    (expected,) = torch.autograd.grad(cubes(scan)(x), x)
    torch.testing.assert_close(torch.func.grad(cubes(scan))(x.detach()), expected, **TOLERANCE)


def test_gradients_of_every_sample_by_vmap(scan: Scan, x: Tensor) -> None:
    each = torch.vmap(torch.func.grad(lambda one: cubes(scan)(one.unsqueeze(0))))(x)
    torch.testing.assert_close(each, torch.func.grad(cubes(scan, "reference"))(x), **TOLERANCE)
    values = torch.vmap(lambda one: scan(one.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(values, scan(x), **TOLERANCE)


INPUT = draw(1, CHANNELS, SIDE**2)
HEAD, GROUP = (INPUT.mT.unsqueeze(2), ROWS.mT.unsqueeze(2))  # (1, L, 1, E) and (1, L, 1, N)
TWO_ROUTES = (DECAY.expand(2, 1), *(2 * (GROUP.unflatten(1, (SIDE, SIDE)),)), DECAY)
ONE_OF_MANY: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "causal_conv1d": (causal_conv1d, (INPUT, draw(CHANNELS, 4), D)),
    "bidirectional_causal_conv1d": (bidirectional_causal_conv1d, (INPUT, draw(2, CHANNELS, 4), draw(2, CHANNELS))),
    "selective_scan": (selective_scan, (INPUT, DELTA[None].abs(), A, ROWS, ROWS, D, INPUT, D)),
    "bidirectional_scan": (
        lambda x, *direction: bidirectional_scan(x, ScanDirection(*direction), DIRECTION),
        (torch.cat([INPUT, INPUT], 1).mT, *DIRECTION),
    ),
    "cross_selective_scan": (cross_selective_scan, (INPUT.unflatten(2, (SIDE, SIDE)), *ROUTES)),
    "ssd": (ssd, (HEAD, STEP, DECAY, GROUP, GROUP, DECAY, HEAD)),
    "cross_ssd": (
        partial(cross_ssd, mode=("w2", "v_flip")),
        (*(t.unflatten(1, (SIDE, SIDE)) for t in (HEAD, STEP.expand(1, -1, 2).unsqueeze(-1))), *TWO_ROUTES),
    ),
}


@pytest.mark.parametrize("name", ONE_OF_MANY)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_any_argument_may_be_mapped_alone(name: str, requires_grad: bool) -> None:
    function, arguments = ONE_OF_MANY[name]
    arguments = tuple(argument.clone().requires_grad_(requires_grad) for argument in arguments)
    for i, argument in enumerate(arguments):
        values = torch.stack([argument, 1.2 * argument])

        def run(value: Tensor, i: int = i) -> Tensor:
            return function(*arguments[:i], value, *arguments[i + 1 :])

        each = torch.stack([run(value) for value in values])
        torch.testing.assert_close(torch.vmap(run)(values), each, **TOLERANCE)


def test_second_derivatives_by_torch_func(scan: Scan, x: Tensor, tangent: Tensor) -> None:
    def along(impl: str) -> Tensor:
        return torch.func.grad(lambda x: (torch.func.grad(cubes(scan, impl))(x) * tangent).sum())(x)

    torch.testing.assert_close(along("auto"), along("reference"), **TOLERANCE)


def test_second_derivative_of_a_kernel_is_refused_in_one_sentence(scan: Scan, x: Tensor) -> None:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(cubes(scan)(x), x, create_graph=True)
    with pytest.raises(ValueError, match=r"first derivatives; got a second one.*torch\.func"):
        gradient.sum().backward()


def test_a_batch_of_output_gradients_by_vmap(scan: Scan, x: Tensor) -> None:
    y = scan(x.requires_grad_())
    batch = torch.randn(2, *y.shape)

    def pull(v: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, v, retain_graph=True)[0]

    torch.testing.assert_close(torch.vmap(pull)(batch), torch.stack([pull(v) for v in batch]), **TOLERANCE)


def test_a_kernel_asked_for_by_name_is_refused_under_a_transform(scan: Scan, x: Tensor) -> None:
    with pytest.raises(ValueError, match="impl='cpu' has values and gradients; got tensors under forward mode"):
        torch.func.grad(lambda x: scan(x, "cpu").sum())(x)


def test_a_graph_without_gradients_that_is_differentiated_says_so(
    scan: Scan, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph made under no_grad calls the operator with keep_states off; its gradients would start from no states."""
    for api in ("selective_scan", "bidirectional_scan", "cross_scan", "ssd"):
        monkeypatch.setattr(f"ssmpretrain.kernels.{api}.api.keeps_states", lambda inputs: False)
    y = scan(x.requires_grad_())
    with pytest.raises(ValueError, match="made without gradients and keeps nothing for them; got one to compute"):
        y.sum().backward()
