import pytest
import torch
from selective_scans import compare, make_inputs

from ssmpretrain.kernels.gpu import scan
from ssmpretrain.kernels.selective_scan import selective_scan
from ssmpretrain.kernels.selective_scan.op import selective_scan_backward_op, selective_scan_op

SHAPES = [  # batch, channels, tokens, state, groups
    (2, 5, 1, 3, None),
    (1, 33, 5, 16, None),
    (2, 6, 9, 1, 2),
    (1, 3, 6, 18, None),
    (1, 4, 7, 5, 4),
    (1, 3, 1, 2, None),  # one token: what lies side by side elsewhere is contiguous here
    (1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_forward_and_backward(
    device: torch.device, shape: tuple[int, ...], reverse: bool
) -> None:
    compare(make_inputs(*shape), "triton", device, delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("optional", [False, True])
def test_softplus_and_optional_inputs_may_be_left_out(device: torch.device, optional: bool) -> None:
    compare(make_inputs(1, 5, 6, 2, softplus=False, optional=optional), "triton", device)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("short_chunks")
def test_chunks_follow_one_another(device: torch.device, reverse: bool) -> None:
    compare(make_inputs(2, 5, 19, 4), "triton", device, delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize(("state", "reverse"), [(3, False), (3, True), (17, True)])
@pytest.mark.usefixtures("parallel_chunks")
def test_chunks_in_parallel_agree_with_the_reference(device: torch.device, state: int, reverse: bool) -> None:
    compare(make_inputs(1, 6, 19, state, 2), "triton", device, delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written(device: torch.device, dtype: torch.dtype) -> None:
    compare(make_inputs(2, 5, 9, 4, dtype=dtype), "triton", device, delta_softplus=True)


def test_every_input_has_its_own_dtype(device: torch.device) -> None:
    inputs = make_inputs(1, 5, 9, 4)
    for name in ("delta", "B", "z"):
        inputs[name] = inputs[name].bfloat16()
    out = selective_scan(**{n: t.to(device) for n, t in inputs.items()}, delta_softplus=True, impl="triton")
    expected = selective_scan(**inputs, delta_softplus=True, impl="reference")
    assert isinstance(out, torch.Tensor) and isinstance(expected, torch.Tensor)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_any_strides_are_read_and_those_of_u_are_kept(device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(2, 6, 7, 4).items()}
    dense = selective_scan(**inputs, delta_softplus=True, impl="triton")
    assert isinstance(dense, torch.Tensor) and dense.stride() == inputs["u"].stride()
    for strided in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t], -1)[..., 0]):
        changed = {name: strided(tensor) if tensor.ndim == 3 else tensor for name, tensor in inputs.items()}
        out = selective_scan(**changed, delta_softplus=True, impl="triton")
        assert isinstance(out, torch.Tensor)
        assert torch.equal(out, dense)
    compare(changed, "triton", device, delta_softplus=True)


@pytest.mark.gpu
def test_results_are_the_same_bits_every_time(device: torch.device) -> None:
    def run() -> list[torch.Tensor]:
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in make_inputs(2, 40, 9, 4).items()}
        out = selective_scan(**leaves, delta_softplus=True, impl="triton")
        assert isinstance(out, torch.Tensor)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_huge_steps_forget_everything_without_nan(device: torch.device) -> None:
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in make_inputs(1, 5, 9, 4).items()}
    leaves["delta_bias"] = torch.full((5,), 1e4, device=device, requires_grad=True)
    out = selective_scan(**leaves, delta_softplus=True, impl="triton")
    assert isinstance(out, torch.Tensor) and out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert grad.isfinite().all()


def test_operators_pass_opcheck(device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(1, 4, 5, 2, 1).items()}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(selective_scan_op, (*leaves, True, False, True, "triton"))
    detached = [leaf.detach() for leaf in leaves]
    out, last, states = selective_scan_op(*detached, True, False, True, "triton")
    torch.library.opcheck(selective_scan_backward_op, (out, last, states, *detached, True, False, "triton"))


@pytest.mark.parametrize(
    ("sequences", "channels", "tokens", "expected"),
    [
        (512, 384, 197, (128, False)),  # Vim-Ti, both directions of 256 images
        (256, 384, 197, (64, False)),
        (16, 384, 197, (32, False)),
        (2, 384, 6085, (128, True)),  # one image of 1248 pixels
        (174, 384, 1025, (128, True)),
        (176, 384, 1025, (128, False)),
        (4, 20, 10_000, (32, True)),
    ],
)
def test_plan_depends_on_the_sizes_alone(
    sequences: int, channels: int, tokens: int, expected: tuple[int, bool]
) -> None:
    assert scan._plan(sequences, channels, tokens) == expected
