"""AdamW with the learning-rate rule and the parameter groups of self-supervised pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn


class OptimizerSettings(Protocol):
    """What a recipe sets of an optimizer; a data class of plain data."""

    def describe(self, global_batch: int) -> str:
        """The arithmetic of the learning rate, for the log."""

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.Optimizer:
        """The optimizer of the trainable parameters of `module` for `global_batch` images a step."""


@dataclass
class AdamW:
    """Settings of the AdamW optimizer.

    Args:
        lr_per_256: Base learning rate for 256 images a step, at least 0 (MAE's "blr"); the peak learning rate is
            `lr_per_256 * global_batch / 256`, the global batch counted over devices, nodes and accumulation.
        weight_decay: Decoupled weight decay, at least 0.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Added to the denominator, above 0.
        decay: "matrices" leaves biases, norms and what an encoder lists in `no_weight_decay()` (A_log, D, delta
            biases, position and class tokens) without decay; "all" decays every parameter, as masked Vim was published.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); the scaling rule is that of
        Goyal et al. (arXiv:1706.02677).
    """

    lr_per_256: float = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: Literal["matrices", "all"] = "matrices"

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # a checkpoint or a recipe gives a list
        for name in ("lr_per_256", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"AdamW: {name} is at least 0; got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdamW: betas lie in [0, 1); got {list(self.betas)}")

    def peak_lr(self, global_batch: int) -> float:
        """Learning rate after warm-up for `global_batch` images a step."""
        return self.lr_per_256 * global_batch / 256

    def describe(self, global_batch: int) -> str:
        return f"peak lr {self.peak_lr(global_batch):.3g} = {self.lr_per_256:.3g} x global batch / 256"

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.AdamW:
        """Optimizer over the trainable parameters of `module`, in at most two groups (with and without decay)."""
        groups = parameter_groups(module, self.weight_decay, self.decay)
        return torch.optim.AdamW(groups, lr=self.peak_lr(global_batch), betas=self.betas, eps=self.eps)


def parameter_groups(module: nn.Module, weight_decay: float, decay: str = "matrices") -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` by weight decay.

    A parameter goes without decay if it has at most one dimension or if a submodule lists it in its
    `no_weight_decay()`; with `decay="all"` every parameter is decayed. The names travel along under "param_names".
    """
    exempt = set(_no_weight_decay(module))
    groups: dict[bool, dict[str, Any]] = {
        True: {"params": [], "param_names": [], "weight_decay": weight_decay},
        False: {"params": [], "param_names": [], "weight_decay": 0.0},
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = decay == "all" or (parameter.ndim > 1 and name not in exempt)
            groups[decayed]["params"].append(parameter)
            groups[decayed]["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _no_weight_decay(module: nn.Module) -> Iterator[str]:
    for prefix, child in module.named_modules():
        listed = getattr(child, "no_weight_decay", None)
        for name in listed() if callable(listed) else ():
            yield f"{prefix}.{name}" if prefix else name
