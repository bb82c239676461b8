import pytest
import torch
from decay_scan import decay_scan, decay_scan_reference
from decay_scan.op import decay_scan_op


@pytest.mark.parametrize("reverse", [False, True])
def test_agrees_with_the_reference_forward_and_backward(device: torch.device, reverse: bool) -> None:
    inputs = [torch.randn(2, 5, 33, requires_grad=True), (-torch.rand(2, 5, 33)).requires_grad_()]
    truth = decay_scan_reference(*inputs, reverse=reverse)
    expected = torch.autograd.grad(truth.square().sum(), inputs)
    y = decay_scan(*(t.to(device) for t in inputs), reverse=reverse, impl="triton")
    torch.testing.assert_close(y.cpu(), truth)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), expected)


def test_its_operator_passes_opcheck(device: torch.device) -> None:
    inputs = [torch.randn(1, 3, 4, device=device).requires_grad_() for _ in range(2)]
    torch.library.opcheck(decay_scan_op, (*inputs, False, "triton"))
