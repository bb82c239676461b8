"""AdamW with the learning-rate rule and the parameter groups of self-supervised pretraining."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.optim.layer_decay import layer_numbers

Decay = Literal["matrices", "by_dimension", "clip", "all"]


class OptimizerSettings(Protocol):
    """Interface of the settings of an optimizer in a recipe; implement it by a dataclass of plain data."""

    def describe(self, global_batch: int) -> str:
        """Describe how the learning rate follows from the global batch, in a line for the log."""

    def build(self, module: nn.Module, global_batch: int) -> torch.optim.Optimizer:
        """Build the optimizer of the trainable parameters of `module` for `global_batch` images a step."""


@dataclass
class AdamW:
    """Settings of the AdamW optimizer.

    Args:
        lr_per_256: Base learning rate for 256 images per step, at least 0 (MAE's "blr"). The peak learning rate is
            `lr_per_256 * global_batch / 256`. The global batch is counted over devices, nodes and accumulation.
        weight_decay: Decoupled weight decay, at least 0.
        final_weight_decay: Weight decay at the end of the run, at least 0: it moves there from `weight_decay` by half a
            cosine, step by step, as in DINO. None keeps `weight_decay`. The parameters without weight decay stay so.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Constant added to the denominator, above 0.
        decay: Rule for the parameters with weight decay:

            - "matrices": all parameters except those of one dimension and those that an encoder lists in
              `no_weight_decay()` (position and class tokens, A_log, D, step-size biases).
            - "by_dimension": all except those of one dimension, those named `.bias`, and position and class tokens.
              A_log and VMamba's step-size biases are matrices and get weight decay, as in the released training code of
              Vim and VMamba.
            - "clip": all except those of one dimension and those with "bias" anywhere in their names. A_log, position
              and class tokens get weight decay, as in open_clip and CLIP-Mamba.
            - "all": every parameter, as in the pretraining of masked Vim.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); the scaling rule is that of
        Goyal et al. (arXiv:1706.02677).
    """

    lr_per_256: float = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: Decay = "matrices"
    final_weight_decay: float | None = None

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # a checkpoint or a recipe gives a list
        for name in ("lr_per_256", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"AdamW: {name} is finite and at least 0; got {getattr(self, name)}")
        if self.final_weight_decay is not None and not 0 <= self.final_weight_decay < math.inf:
            raise UserError(
                f"AdamW: final_weight_decay is finite and at least 0; got {self.final_weight_decay}. Null keeps "
                "weight_decay."
            )
        if not 0 < self.eps < math.inf:
            raise UserError(f"AdamW: eps is finite and above 0; got {self.eps}. 1e-8 is usual.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"AdamW: betas lie in [0, 1); got {list(self.betas)}")

    def peak_lr(self, global_batch: int) -> float:
        """Return the learning rate after warm-up for `global_batch` images a step."""
        return self.lr_per_256 * global_batch / 256

    def describe(self, global_batch: int) -> str:
        rate = f"peak lr {self.peak_lr(global_batch):.3g} = {self.lr_per_256:.3g} x global batch / 256"
        if self.final_weight_decay is None:
            return rate
        return f"{rate}; weight decay from {self.weight_decay:g} to {self.final_weight_decay:g} by half a cosine"

    def build(self, module: nn.Module, global_batch: int, layer_decay: float = 1.0) -> torch.optim.AdamW:
        """Build the optimizer over the trainable parameters of `module`, in the groups of `parameter_groups`.

        Each group's learning rate is the peak times its `lr_scale`; a schedule multiplies it, and moves weight decay.
        """
        peak = self.peak_lr(global_batch)
        groups = parameter_groups(module, self.weight_decay, self.decay, layer_decay, self.final_weight_decay)
        for group in groups:
            group["lr"] = peak * group["lr_scale"]
        return torch.optim.AdamW(groups, lr=peak, betas=self.betas, eps=self.eps)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    decay: Decay = "matrices",
    layer_decay: float = 1.0,
    final_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` by layer and by weight decay.

    Args:
        module: The encoder, or a module that contains it.
        weight_decay: Weight decay of the parameters that the rule `decay` selects.
        decay: Rule for the parameters with weight decay; see `AdamW`.
        layer_decay: Factor on the learning rate from one layer to the one below it, in (0, 1]. With 1, parameters are
            not split by layer.
        final_weight_decay: Weight decay at the end of the run; None if it stays.

    Returns:
        Groups for an optimizer of torch, from the lowest layer to the head. In each layer the group with weight decay
        comes first. Beside torch's keys a group has "param_names", "layer" (0 for the embeddings) and "lr_scale" (1 for
        the head); and "initial_weight_decay" and "final_weight_decay" if its weight decay moves, see `FactorLR`.
    """
    layers = layer_numbers(module) if layer_decay < 1 else {}
    top = max(layers.values(), default=0)
    decayed = _decayed_names(module, decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            layer, spared = layers.get(name, top), name not in decayed
            group = groups.setdefault((layer, spared), {"params": [], "param_names": []})
            group["params"].append(parameter)
            group["param_names"].append(name)
    for (layer, spared), group in groups.items():
        group |= {"weight_decay": 0.0 if spared else weight_decay, "layer": layer}
        group["lr_scale"] = layer_decay ** (top - layer)
        if final_weight_decay is not None and not spared:
            group |= {"initial_weight_decay": weight_decay, "final_weight_decay": final_weight_decay}
    return [groups[key] for key in sorted(groups)]


def _decayed_names(module: nn.Module, decay: Decay) -> set[str]:
    """Return the names of the parameters with weight decay under the rule `decay`."""
    if decay == "clip":
        exempt = {name for name, _ in module.named_parameters() if "bias" in name}
    else:
        exempt = set(_no_weight_decay(module, tokens_only=decay == "by_dimension"))
    if decay == "by_dimension":
        exempt |= {name for name, _ in module.named_parameters() if name.endswith(".bias")}
    return {
        name
        for name, parameter in module.named_parameters()
        if decay == "all" or (parameter.ndim > 1 and name not in exempt)
    }


def _no_weight_decay(module: nn.Module, tokens_only: bool) -> Iterator[str]:
    """Yield the names without weight decay that encoders in `module` list; with `tokens_only`, names outside layers."""
    for prefix, child in module.named_modules():
        listed = getattr(child, "no_weight_decay", None)
        for name in listed() if callable(listed) else ():
            if not (tokens_only and "." in name):
                yield f"{prefix}.{name}" if prefix else name
