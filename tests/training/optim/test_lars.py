"""LARS: a step worked by hand, and tensors that are not adapted."""

import pytest
import torch
from torch import nn

from ssmpretrain.training.optim.lars import LARS


def one_head(weight: list[list[float]], bias: list[float], lr_per_256: float = 0.5) -> nn.Linear:
    head = nn.Linear(2, len(bias))
    head.weight.data, head.bias.data = torch.tensor(weight), torch.tensor(bias)
    head.lr_per_256 = lr_per_256  # type: ignore[assignment]
    return head


def test_two_steps_by_hand() -> None:
    """|p| = 5 and |g| = 10, so the first step is lr x 0.001 x 5 / 10 x g; the bias takes lr x g."""
    head = one_head([[3.0, 4.0]], [1.0])
    optimizer = LARS().build(head, global_batch=512)  # lr 1.0
    head.weight.grad, head.bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([2.0])
    optimizer.step()
    assert head.weight.tolist() == [pytest.approx([3 - 0.003, 4 - 0.004])] and head.bias.tolist() == pytest.approx([-1])
    head.weight.grad, head.bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.5])
    optimizer.step()
    ratio = 0.001 * (2.997**2 + 3.996**2) ** 0.5  # |g| = 1
    expected = [2.997 - 0.9 * 0.003, 3.996 - (0.9 * 0.004 + ratio)]
    assert head.weight.tolist() == [pytest.approx(expected)]
    assert head.bias.tolist() == pytest.approx([-1 - (0.9 * 2.0 + 0.5)])


def test_a_long_run_follows_the_formula_of_mae() -> None:
    """Momentum before the rate, and the rate of each step: a rate that falls tells `m = 0.9 m + lr g` apart."""
    torch.manual_seed(0)
    head = one_head(torch.randn(3, 2).tolist(), torch.randn(3).tolist())
    optimizer = LARS(trust_coefficient=0.01).build(head, global_batch=256)
    tensors = [head.weight, head.bias]
    p, m = [tensor.detach().double() for tensor in tensors], [torch.zeros(())] * 2
    for step in range(20):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for index, tensor in enumerate(tensors):
            tensor.grad = torch.randn_like(tensor)
            g = tensor.grad.double()
            m[index] = 0.9 * m[index] + (0.01 * p[index].norm() / g.norm() * g if g.ndim > 1 else g)
            p[index] = p[index] - lr * m[index]
        optimizer.step()
    assert all(torch.allclose(tensor.double(), truth, atol=1e-5) for tensor, truth in zip(tensors, p, strict=True))


def test_a_tensor_or_gradient_of_zeros_is_not_adapted() -> None:
    head = one_head([[0.0, 0.0]], [0.0])
    optimizer = LARS(momentum=0.0).build(head, 512)
    head.weight.grad = torch.tensor([[1.0, 2.0]])
    optimizer.step()
    assert head.weight.tolist() == [[-1.0, -2.0]]
    head.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert head.weight.tolist() == [[-1.0, -2.0]]


def test_decay_is_for_matrices_alone() -> None:
    head = one_head([[3.0, 4.0]], [1.0])
    optimizer = LARS(weight_decay=0.1, momentum=0.0).build(head, 512)
    head.weight.grad, head.bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([2.0])
    optimizer.step()
    ratio = 0.001 * 5 / (10 + 0.1 * 5)
    assert head.weight.tolist() == [pytest.approx([3 - ratio * 6.3, 4 - ratio * 8.4])]
    assert head.bias.tolist() == pytest.approx([-1])


def test_what_asks_for_adamw_takes_its_steps_beside_the_others() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([one_head([[3.0, 4.0]], [1.0]), one_head([[3.0, 4.0]], [1.0])])
    model[1].trains_with = "adamw"  # type: ignore[assignment]
    optimizer, truth = LARS().build(model, 512), one_head([[3.0, 4.0]], [1.0])
    expected = torch.optim.AdamW(truth.parameters(), lr=1.0, weight_decay=0.0)
    for _ in range(3):
        for parameter, other in zip(model[1].parameters(), truth.parameters(), strict=True):
            parameter.grad = other.grad = torch.randn_like(parameter)
        model[0].weight.grad = torch.tensor([[6.0, 8.0]])
        assert optimizer.step(lambda: 7.0) == 7.0
        expected.step()
    assert all(torch.equal(a, b) for a, b in zip(model[1].parameters(), truth.parameters(), strict=True))
    assert 4.9 < model[0].weight.norm() < 5
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay is finite and at least 0; got -1"),
        ({"momentum": 1.0}, r"momentum lies in \[0, 1\); got 1"),
        ({"trust_coefficient": 0.0}, "trust_coefficient is finite and above 0; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(**settings)
