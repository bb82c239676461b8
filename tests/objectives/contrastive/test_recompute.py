"""Recomputation in the backward pass gives the first results again, and has no side effects."""

import pytest
import torch
from torch import Tensor, nn

from ssmpretrain.objectives.contrastive.recompute import recomputed


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())


def gradients(module: nn.Module, outputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs.square().sum(), list(module.parameters())))


def test_gradients_are_to_the_last_bit_those_of_work_that_is_kept_dropout_included(module: nn.Module) -> None:
    x, found = torch.randn(8, 4), []
    for outputs in (lambda: module(x), lambda: recomputed(module, x, module)):
        torch.manual_seed(1)
        made = outputs()
        torch.rand(3)  # what is drawn in between does not matter
        found.append([made, *gradients(module, made)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_running_statistics_count_a_batch_once(module: nn.Module) -> None:
    norm, x = module[1], torch.randn(8, 4)
    gradients(module, recomputed(module, x, module))
    once = nn.BatchNorm1d(4)
    once(module[0](x))
    assert torch.equal(norm.running_mean, once.running_mean) and torch.equal(norm.running_var, once.running_var)
    assert norm.num_batches_tracked == 1 and norm.momentum == 0.1


def test_nothing_is_kept_but_what_the_work_begins_with(module: nn.Module) -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        recomputed(module, torch.randn(8, 4), module)
    assert sum(kept) == 8 * 4
