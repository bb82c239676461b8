"""LARS, the optimizer of MAE's linear probe at large batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.optim.lars import lars
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.optim.head_optimizer import HeadOptimizer, HeadSteps, check_momentum, check_weight_decay


@dataclass
class LARS(HeadOptimizer):
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

    title: ClassVar[str] = "LARS"

    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001

    def __post_init__(self) -> None:
        check_weight_decay("LARS", self.weight_decay)
        check_momentum("LARS", self.momentum)
        if not 0 < self.trust_coefficient < math.inf:
            raise UserError(f"LARS: trust_coefficient is finite and above 0; got {self.trust_coefficient}")

    def rule(self, parameter: Tensor) -> dict[str, Any]:
        kind, decay = ("lars", self.weight_decay) if parameter.ndim > 1 else ("sgd", 0.0)
        return {
            "steps_with": kind,
            "weight_decay": decay,
            "momentum": self.momentum,
            "trust_coeff": self.trust_coefficient,
        }

    def over(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return LarsAndAdamW(groups)


class LarsAndAdamW(HeadSteps):
    """Optimizer whose groups choose their rule by `steps_with`: "lars", "sgd" (LARS with q = 1) or "adamw"."""

    def take(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if group["steps_with"] != "lars":
            super().take(group, parameters, gradients)
            return
        momenta = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        lars(
            parameters, gradients, momenta, lr=group["lr"], momentum=group["momentum"], dampening=0.0,
            weight_decay=group["weight_decay"], nesterov=False, trust_coeff=group["trust_coeff"], eps=0.0,
            trust_clip=False, always_adapt=True,
        )  # fmt: skip
        for parameter, momentum in zip(parameters, momenta, strict=True):  # timm makes them in the first step
            self.state[parameter]["momentum_buffer"] = momentum
