"""An operation that is added from outside (`tests/support/decay_scan`): one folder, and no edit anywhere else."""

import pytest
import torch
from decay_scan import decay_scan, decay_scan_reference
from decay_scan.op import decay_scan_op
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def make_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 7, 5, requires_grad=True), (-torch.rand(2, 7, 5)).requires_grad_()


@pytest.mark.parametrize("reverse", [False, True])
def test_each_implementation_agrees_with_the_reference(reverse: bool) -> None:
    inputs = make_inputs()
    truth = decay_scan_reference(*(t.double() for t in inputs), reverse=reverse)
    expected = torch.autograd.grad(truth.square().sum(), inputs)
    for impl in ("auto", "cpu", "reference"):
        y = decay_scan(*inputs, reverse=reverse, impl=impl)
        torch.testing.assert_close(y, truth.float())
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), expected)


def test_its_operator_runs_on_the_cpu_and_plain_pytorch_where_more_is_asked() -> None:
    x, log_decay = (t.detach() for t in make_inputs())
    with FlopCounterMode(display=False) as counter:
        decay_scan(x, log_decay)
    assert counter.get_total_flops() == 3 * x.numel()  # the operator ran
    with FlopCounterMode(display=False) as counter:
        decay_scan(x.double(), log_decay.double())
        torch.func.grad(lambda x: decay_scan(x, log_decay).sum())(x)
    assert counter.get_total_flops() == 0
    program = torch.export.export(Scan(), (x, log_decay))
    assert not any("outside" in str(node.target) for node in program.graph.nodes)


class Scan(torch.nn.Module):
    def forward(self, x: Tensor, log_decay: Tensor) -> Tensor:
        return decay_scan(x, log_decay)


def test_its_operator_passes_opcheck_and_compiles() -> None:
    inputs = make_inputs()
    torch.library.opcheck(decay_scan_op, (*inputs, True, "native"))
    compiled = torch.compile(decay_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), decay_scan(*inputs))


def test_what_does_not_fit_is_refused_by_its_name() -> None:
    x, log_decay = make_inputs()
    with pytest.raises(ValueError, match=r"^decay_scan: impl is one of auto, reference, cpu, triton; got 'cuda'"):
        decay_scan(x, log_decay, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^decay_scan: log_decay is float32, bfloat16 or float16; got torch.int64"):
        decay_scan(x, log_decay.long())
