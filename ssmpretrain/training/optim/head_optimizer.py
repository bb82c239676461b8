"""Optimizers of the heads of a probe: every head trains as if it were alone, at its own learning rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.settings import Settings


@dataclass
class HeadOptimizer(Settings):
    """Base class of the optimizers of a probe's heads: `LARS`, `SGD` and `HeadAdamW`.

    The learning rates are not here: each head has its own. A recipe names the kind, for example
    `optimizer: {class_path: ssmpretrain.training.optim.SGD, init_args: {weight_decay: 0.01}}`.

    Attributes:
        title: Name of the optimizer in reports.
    """

    unnamed: ClassVar[str] = "LARS"
    title: ClassVar[str] = ""

    @abstractmethod
    def rule(self, parameter: Tensor) -> dict[str, Any]:
        """Return the settings of the optimizer's group that a parameter belongs to, with its `steps_with`."""

    @abstractmethod
    def over(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer of groups of parameters."""

    def describe(self, global_batch: int) -> str:
        """Describe how the learning rates follow from the global batch, in a line for the log."""
        return f"{self.title}; peak lr lr_per_256 x {global_batch / 256:.4g} (global batch / 256)"

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.Optimizer:
        """Build the optimizer over the submodules with an attribute `lr_per_256`, each at its peak learning rate.

        Each rate and rule has a group. A submodule with the attribute `trains_with = "adamw"` takes steps of AdamW
        without weight decay, whatever the kind of these settings.
        """
        groups: dict[tuple[float, str], dict[str, Any]] = {}
        for prefix, child in module.named_modules():
            rate: Any = getattr(child, "lr_per_256", None)
            for name, parameter in child.named_parameters() if rate is not None else ():
                own = getattr(child, "trains_with", None) == "adamw"
                rule = adamw_rule(0.0) if own else self.rule(parameter)
                empty = {"params": [], "param_names": [], "lr": rate * global_batch / 256, **rule}
                group = groups.setdefault((rate, "own" if own else rule["steps_with"]), empty)
                group["params"].append(parameter)
                group["param_names"].append(f"{prefix}.{name}" if prefix else name)
        return self.over(list(groups.values()))


@dataclass
class SGD(HeadOptimizer):
    """Settings of stochastic gradient descent with momentum: `m = momentum m + g + weight_decay p`, `p = p - lr m`.

    Args:
        weight_decay: Factor of the tensor that is added to the gradient, at least 0; of biases too, as in torch. The
            probe of DINO uses 0, those of Dino-Mamba 0, 0.001 and 0.01.
        momentum: Factor of the previous update, in [0, 1).

    Source: The linear probes of Caron et al., "DINO" (arXiv:2104.14294), and its code.
    """

    title: ClassVar[str] = "SGD"

    weight_decay: float = 0.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_weight_decay("SGD", self.weight_decay)
        check_momentum("SGD", self.momentum)

    def rule(self, parameter: Tensor) -> dict[str, Any]:
        return {"steps_with": "sgd", "weight_decay": self.weight_decay, "momentum": self.momentum}

    def over(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SgdAndAdamW(groups)


@dataclass
class HeadAdamW(HeadOptimizer):
    """Settings of AdamW for the heads of a probe.

    Args:
        weight_decay: Decoupled weight decay of all parameters of a head, at least 0. LeJEPA's probe uses 1e-6.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Constant added to the denominator, above 0.

    Source: Balestriero & LeCun, "LeJEPA" (arXiv:2511.08544), linear probe evaluation of its code.
    """

    title: ClassVar[str] = "AdamW"

    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # a checkpoint or a recipe gives a list
        check_weight_decay("HeadAdamW", self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"HeadAdamW: betas lie in [0, 1); got {list(self.betas)}. 0.9 and 0.999 are usual.")
        if not 0 < self.eps < math.inf:
            raise UserError(f"HeadAdamW: eps is finite and above 0; got {self.eps}. 1e-8 is usual.")

    def rule(self, parameter: Tensor) -> dict[str, Any]:
        return adamw_rule(self.weight_decay, self.betas, self.eps)

    def over(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)


def adamw_rule(weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> dict[str, Any]:
    """Return the settings of a group that takes steps of AdamW."""
    return {"steps_with": "adamw", "weight_decay": weight_decay, "betas": betas, "eps": eps}


class HeadSteps(torch.optim.Optimizer):
    """Base class of optimizers whose groups choose their rule by `steps_with`: "sgd", "adamw", or one of a subclass."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. If `closure` is given, it computes the loss and the gradients first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            self.take(group, parameters, [parameter.grad for parameter in parameters])
        return loss

    def take(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Move the parameters of a group by one step of its rule."""
        (self._adamw if group["steps_with"] == "adamw" else self._sgd)(group, parameters, gradients)

    def _sgd(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        sgd(
            parameters, gradients, momenta, weight_decay=group["weight_decay"], momentum=group["momentum"],
            lr=group["lr"], dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        for parameter, momentum in zip(parameters, momenta, strict=True):  # torch makes them in the first step
            self.state[parameter]["momentum_buffer"] = momentum

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **moments}
        first, second, steps = (
            [self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        beta1, beta2 = group["betas"]
        adamw(
            parameters, gradients, first, second, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
            eps=group["eps"], weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
        )  # fmt: skip


class SgdAndAdamW(HeadSteps):
    """Optimizer whose groups take steps of "sgd" or "adamw"."""


def check_weight_decay(where: str, weight_decay: float) -> None:
    """Raise a `UserError` unless a weight decay is finite and at least 0."""
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"{where}: weight_decay is finite and at least 0; got {weight_decay}. 0 is usual.")


def check_momentum(where: str, momentum: float) -> None:
    """Raise a `UserError` unless a momentum is in [0, 1)."""
    if not 0 <= momentum < 1:
        raise UserError(f"{where}: momentum lies in [0, 1); got {momentum}. 0.9 is usual.")
