import pytest
import torch
import triton
import triton.language as tl
from cross_scans import NAMES, WINDOWS, compare, error, leaves_of, make_inputs
from packed_scans import compare_packed, draw_positions

from ssmpretrain.kernels.cross_scan import (
    Mode,
    cross_selective_scan,
    cross_selective_scan_reference,
    triton_one_state,
)
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.op import cross_selective_scan_backward_op, cross_selective_scan_op
from ssmpretrain.kernels.cross_scan.triton_kernels.backward import softplus_slope

SIZES = [(7, 5), (1, 9), (2, 8)]  # three chunks of 16 steps, the last with 3 of them; less than one; just one


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["cross", WINDOWS], ids=str)
def test_agrees_with_the_reference_forward_and_backward(
    device: torch.device, mode: Mode, size: tuple[int, int]
) -> None:
    routes = 4 if isinstance(mode, str) else len(mode)
    compare(make_inputs(1, 5, *size, 1, routes=routes), mode, device=device, impl="triton")


@pytest.mark.parametrize("mode", ["unidirectional", "bidirectional"])
def test_routes_that_share_an_order_agree_with_the_reference(device: torch.device, mode: Mode) -> None:
    compare(make_inputs(1, 5, 3, 7, 1), mode, device=device, impl="triton")


def test_more_routes_than_a_launch_takes_agree_with_the_reference(device: torch.device) -> None:
    mode = ("h", "h_flip", "h", "h", "h_flip", "v")
    compare(make_inputs(1, 3, 1, 17, 1, routes=6), mode, device=device, impl="triton")


def test_cascade_agrees_with_the_reference(device: torch.device) -> None:
    compare(make_inputs(1, 5, 2, 3, 1), "cascade", device=device, impl="triton")


def test_many_chunks_pass_their_states_on(device: torch.device) -> None:
    compare(make_inputs(1, 2, 13, 20, 1, rank=1, routes=1), ("v_flip",), device=device, impl="triton")


@pytest.mark.parametrize(("shape", "rank"), [((2, 33, 1, 9), 18), ((1, 1, 5, 4), 1)], ids=str)
def test_any_number_of_channels_and_any_rank(device: torch.device, shape: tuple[int, ...], rank: int) -> None:
    compare(make_inputs(*shape, 1, rank=rank, routes=2), ("h", "v_flip"), device=device, impl="triton")


@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float16, 24), (torch.bfloat16, 64)]
)  # 64: two channels a thread
def test_float32_parameters_meet_a_half_precision_map(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    x, *parameters = make_inputs(1, channels, 4, 5, 1, 6, routes=2)
    compare([x.to(dtype), *parameters], ("v", "v_flip"), device=device, impl="triton")


def test_step_sizes_of_a_bfloat16_map_are_float32(device: torch.device) -> None:
    """Gradients that are not rounded to bfloat16 show it; step sizes are sums of two bfloat16, 2^-16."""
    routes = ("h", "v_flip")
    x, x_proj, dt_proj, *rest = make_inputs(1, 24, 4, 5, 1, 6, routes=2)
    inputs = [x.bfloat16(), x_proj.bfloat16().float(), dt_proj.bfloat16().float(), *rest]
    truth_leaves = leaves_of(inputs, torch.float64)
    truth = cross_selective_scan_reference(*truth_leaves, mode=routes)
    grad = torch.randn_like(truth).bfloat16()
    expected = torch.autograd.grad(truth, truth_leaves, grad.double())

    leaves = [t.to(device).requires_grad_() for t in inputs]
    y = cross_selective_scan(*leaves, mode=routes, impl="triton")
    assert error(y, truth.detach()) < 2**-16
    ours = torch.autograd.grad(y, leaves, grad.to(device, y.dtype))
    for i, name in list(enumerate(NAMES))[3:]:
        assert error(ours[i], expected[i]) < 2**-16, name


@pytest.mark.parametrize("state", [1, 2])
def test_visible_positions_alone_agree_with_stepping_over_the_others(device: torch.device, state: int) -> None:
    x, *parameters = make_inputs(2, 5, 1, 18, state)
    inputs = [x.squeeze(2), *parameters]
    compare_packed(inputs, draw_positions(2, 7, 5, 18), (7, 5), device=device, impl="triton")


@triton.jit
def slopes(y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, softplus_slope(tl.load(y + i)))


def test_slope_of_softplus_is_relatively_exact(device: torch.device) -> None:
    y = torch.logspace(-6, 1.5, 1024)
    out = torch.empty(1024, device=device)
    slopes[(1,)](y.to(device), out, BLOCK=1024)
    truth = -torch.expm1(-y.double())
    assert ((out.cpu() - truth) / truth).abs().max() < 4e-7


def test_any_strides_are_read(device: torch.device) -> None:
    x, *parameters = make_inputs(2, 6, 3, 4, 1, routes=1)
    for strided in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        torch.stack([x, x], dim=-1)[..., 0],
    ):
        compare([strided, *parameters], ("v",), device=device, impl="triton")


def test_autocast_changes_nothing(device: torch.device) -> None:
    inputs = [t.to(device) for t in make_inputs(1, 5, 4, 5, 1, routes=2)]
    expected = cross_selective_scan(*inputs, mode=("h", "v_flip"), impl="triton")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(cross_selective_scan(*inputs, mode=("h", "v_flip"), impl="triton"), expected)


@pytest.mark.gpu
def test_results_are_the_same_bits_every_time(device: torch.device) -> None:
    results = []
    for _ in range(2):
        leaves = [t.to(device).requires_grad_() for t in make_inputs(1, 40, 4, 5, 1, routes=2)]
        y = cross_selective_scan(*leaves, mode=("h", "h_flip"), impl="triton")
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_huge_steps_forget_everything_without_nan(device: torch.device) -> None:
    inputs = [t.to(device) for t in make_inputs(1, 5, 4, 5, 1, routes=2)]
    inputs[3].fill_(1e4)
    leaves = [t.requires_grad_() for t in inputs]
    y = cross_selective_scan(*leaves, mode=("h", "v_flip"), impl="triton")
    for t in (y, *torch.autograd.grad(y.sum(), leaves)):
        assert t.isfinite().all()


@pytest.mark.parametrize("size", [(3, 4), (4, 5)], ids=["one chunk", "two chunks"])
def test_operators_pass_opcheck(device: torch.device, size: tuple[int, int]) -> None:
    inputs = [t.to(device).requires_grad_() for t in make_inputs(1, 4, *size, 1, 2, routes=1)]
    options = ("v_flip", True, "triton")
    torch.library.opcheck(cross_selective_scan_op, (*inputs, *options))
    inputs = [t.detach() for t in inputs]
    y, x_dbl, states = cross_selective_scan_op(*inputs, *options)
    torch.library.opcheck(cross_selective_scan_backward_op, (y, x_dbl, states, *inputs, "v_flip", "triton"))


def test_a_map_beyond_32_bit_offsets_is_refused() -> None:
    shapes = ((1, 1024, 2048, 1024), (1, 3, 1024), (1, 1024, 1), (1, 1024), (1, 1024, 1), (1, 1024))
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    with pytest.raises(ValueError, match=r"^cross_selective_scan: .* below 2\^31; got x \(1, 1024, 2048, 1024\)"):
        triton_one_state.forward(CrossScanInputs(*inputs, ("h",)), False)
