import pytest
import torch
from bidirectional_scans import compare, leaves_of, make_inputs, run

from ssmpretrain.kernels.bidirectional_scan import bidirectional_scan
from ssmpretrain.kernels.bidirectional_scan.op import bidirectional_scan_backward_op, bidirectional_scan_op

SHAPES = [  # batch, channels, tokens, state, rank, taps
    (2, 5, 1, 3, 2, 4),
    (1, 33, 5, 16, 3, 4),
    (2, 4, 9, 1, 5, 3),
    (1, 3, 6, 17, 1, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_forward_and_backward(device: torch.device, shape: tuple[int, ...]) -> None:
    compare(*make_inputs(*shape), device=device, impl="triton")


@pytest.mark.usefixtures("parallel_chunks")
def test_chunks_in_parallel_agree_with_the_reference(device: torch.device) -> None:
    compare(*make_inputs(2, 5, 19, 4), device=device, impl="triton")


def test_one_direction_agrees_with_the_reference(device: torch.device) -> None:
    xz, first, _ = make_inputs(2, 5, 9, 4)
    compare(xz, first, None, device=device, impl="triton")


def test_sum_is_halved_only_when_asked(device: torch.device) -> None:
    compare(*make_inputs(1, 5, 7, 4), divide_output=False, device=device, impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_meet_half_precision_tokens(device: torch.device, dtype: torch.dtype) -> None:
    xz, first, second = make_inputs(2, 24, 12, 4, 6)
    compare(xz.to(dtype), first, second, device=device, impl="triton")


def test_any_strides_are_read(device: torch.device) -> None:
    xz, first, second = make_inputs(2, 5, 7, 4)
    compare(xz.mT.contiguous().mT, first, second, device=device, impl="triton")


def test_autocast_changes_nothing(device: torch.device) -> None:
    leaves = [leaf.to(device) for leaf in leaves_of(*make_inputs(1, 5, 7, 4))]
    expected = run(bidirectional_scan, leaves, impl="triton")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(run(bidirectional_scan, leaves, impl="triton"), expected)


@pytest.mark.gpu
def test_results_are_the_same_bits_every_time(device: torch.device) -> None:
    results = []
    for _ in range(2):
        leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(*make_inputs(1, 40, 9, 4, 5))]
        out = run(bidirectional_scan, leaves, impl="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_operators_pass_opcheck(device: torch.device) -> None:
    xz, *parameters = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(*make_inputs(1, 4, 5, 2, 2))]
    torch.library.opcheck(bidirectional_scan_op, (xz, parameters, True, True, "triton"))
    xz, parameters = xz.detach(), [p.detach() for p in parameters]
    out, x_dbl, states = bidirectional_scan_op(xz, parameters, True, True, "triton")
    torch.library.opcheck(bidirectional_scan_backward_op, (out, x_dbl, states, xz, parameters, True, "triton"))
