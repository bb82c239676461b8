"""LARS, the optimizer of MAE's linear probe at large batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim.lars import lars
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ssmpretrain.base.errors import UserError


@dataclass
class LARS:
    """Settings of the LARS optimizer, which scales each step by the norm of the tensor that it updates.

    With g the gradient and p the tensor, `m = momentum m + q (g + weight_decay p)` and `p = p - lr m`, where
    `q = trust_coefficient |p| / (|g| + weight_decay |p|)`, or 1 if either norm is 0. A tensor of one dimension, such as
    a bias, has q = 1 and no weight decay.

    Args:
        weight_decay: Factor of the tensor that is added to the gradient, at least 0. MAE's probe uses 0; then the
            formula for q agrees with MAE's.
        momentum: Factor of the previous update, in [0, 1).
        trust_coefficient: Factor of the ratio of norms, above 0.

    Source: You et al., "Large Batch Training of Convolutional Networks" (arXiv:1708.03888); values of He et al.
        (arXiv:2111.06377), appendix A.1.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"LARS: weight_decay is finite and at least 0; got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"LARS: momentum lies in [0, 1); got {self.momentum}")
        if not 0 < self.trust_coefficient < math.inf:
            raise UserError(f"LARS: trust_coefficient is finite and above 0; got {self.trust_coefficient}")

    def describe(self, global_batch: int) -> str:
        return f"LARS; peak lr lr_per_256 x {global_batch / 256:.4g} (global batch / 256)"

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.Optimizer:
        """Build the optimizer over the submodules with an attribute `lr_per_256`, each at its peak learning rate.

        Each rate has two groups: tensors of two or more dimensions, and all other tensors. A submodule with the
        attribute `trains_with = "adamw"` has one group, which takes steps of AdamW without weight decay.
        """
        groups: dict[tuple[float, str], dict[str, Any]] = {}
        for prefix, child in module.named_modules():
            rate: Any = getattr(child, "lr_per_256", None)
            for name, parameter in child.named_parameters() if rate is not None else ():
                kind = getattr(child, "trains_with", "lars" if parameter.ndim > 1 else "sgd")
                group = groups.setdefault((rate, kind), self._group(kind, rate * global_batch / 256))
                group["params"].append(parameter)
                group["param_names"].append(f"{prefix}.{name}" if prefix else name)
        return LarsAndAdamW(list(groups.values()))

    def _group(self, kind: str, lr: float) -> dict[str, Any]:
        group: dict[str, Any] = {"params": [], "param_names": [], "lr": lr, "steps_with": kind, "weight_decay": 0.0}
        if kind == "adamw":
            return group
        decay = self.weight_decay if kind == "lars" else 0.0
        return group | {"weight_decay": decay, "momentum": self.momentum, "trust_coeff": self.trust_coefficient}


class LarsAndAdamW(torch.optim.Optimizer):
    """Optimizer whose groups choose their rule by `steps_with`: "lars", "sgd" (LARS with q = 1) or "adamw"."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. If `closure` is given, it computes the loss and the gradients first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            step = self._adamw if group["steps_with"] == "adamw" else self._lars
            step(group, parameters, [parameter.grad for parameter in parameters])
        return loss

    def _lars(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        lars(
            parameters, gradients, momenta, lr=group["lr"], momentum=group["momentum"], dampening=0.0,
            weight_decay=group["weight_decay"], nesterov=False, trust_coeff=group["trust_coeff"], eps=0.0,
            trust_clip=False, always_adapt=group["steps_with"] == "lars",
        )  # fmt: skip
        for parameter, momentum in zip(parameters, momenta, strict=True):  # timm makes them in the first step
            self.state[parameter]["momentum_buffer"] = momentum

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **moments}
        first, second, steps = (
            [self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            parameters, gradients, first, second, [], steps, lr=group["lr"], beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
        )  # fmt: skip
