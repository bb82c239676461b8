"""LARS, with which a linear probe is trained at MAE's large batches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import nn


@dataclass
class LARS:
    """Settings of the LARS optimizer: a step is measured by the norm of the tensor that takes it.

    With g the gradient and p the tensor, `m = momentum m + q (g + weight_decay p)` and `p = p - lr m`, where
    `q = trust_coefficient |p| / (|g| + weight_decay |p|)`, or 1 if either norm is 0. A tensor of one dimension, such as
    a bias, has q = 1 and no decay.

    Args:
        weight_decay: Added to the gradient, at least 0; MAE's probe has none, and its formula for q agrees there.
        momentum: In [0, 1).
        trust_coefficient: Above 0.

    Source: You et al., "Large Batch Training of Convolutional Networks" (arXiv:1708.03888); values of He et al.
        (arXiv:2111.06377), appendix A.1.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001

    def __post_init__(self) -> None:
        if not self.weight_decay >= 0:
            raise ValueError(f"LARS: weight_decay is at least 0; got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LARS: momentum lies in [0, 1); got {self.momentum}")
        if not self.trust_coefficient > 0:
            raise ValueError(f"LARS: trust_coefficient is above 0; got {self.trust_coefficient}")

    def describe(self, global_batch: int) -> str:
        return f"LARS; peak lr lr_per_256 x {global_batch / 256:.4g} (global batch / 256)"

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.Optimizer:
        """Optimizer over what `module` holds that names its own `lr_per_256`, at the peak rate of each.

        Two groups for each rate: tensors of two and more dimensions, and the others.
        """
        tensors: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
        for child in module.modules():
            rate: Any = getattr(child, "lr_per_256", None)
            for parameter in child.parameters() if rate is not None else ():
                tensors[rate, parameter.ndim > 1].append(parameter)
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "lr": lr_per_256 * global_batch / 256,
                "weight_decay": self.weight_decay if adapts else 0.0,
                "always_adapt": adapts,
            }
            for (lr_per_256, adapts), parameters in tensors.items()
        ]
        return Lars(groups, momentum=self.momentum, trust_coeff=self.trust_coefficient, eps=0.0)
