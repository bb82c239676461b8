"""Classifiers on frozen features: one head for each learning rate of a sweep, each trained as if it were alone.

Legend: B images, F features, L patches, D width, C classes, R learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError

Normalisation = Literal["batch", "layer", "none"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)
_NORM_LIMIT = 1e6  # norm above which a head counts as diverged; trained heads have 10 to 100


class LinearHead(nn.Linear):
    """Linear layer from vectors (B, F) to logits (B, C), with the initial values of MAE's probe."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class AttentiveHead(nn.Module):
    """Attentive probe from the patches (B, D, L) of a map to logits (B, C): one learned query, then a linear layer.

    Source: The attentive probe of AIM (El-Nouby et al., arXiv:2401.08541), sec. 4: keys and values without bias, no
        projection and no norm after the attention, trained with AdamW.
    """

    # Best accuracy of five rates on the demo's encoder, 4000 images, 372 steps: 0.593 with LARS, 0.765 with AdamW.
    trains_with = "adamw"  # `HeadOptimizer.build` reads this

    def __init__(self, width: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.classifier = LinearHead(width, num_classes)
        for weight in (self.query, self.key.weight, self.value.weight):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = patches.transpose(1, 2)  # (B, L, D)
        query = self._by_head(self.query.expand(len(tokens), 1, -1))
        attended = F.scaled_dot_product_attention(
            query, self._by_head(self.key(tokens)), self._by_head(self.value(tokens))
        )
        return self.classifier(attended.flatten(1))  # type: ignore[no-any-return]

    def _by_head(self, tokens: Tensor) -> Tensor:
        """Split (B, n, D) into (B, heads, n, D / heads)."""
        B, n, D = tokens.shape
        return tokens.view(B, n, self.num_heads, D // self.num_heads).transpose(1, 2)


class Sweep(nn.Module):
    """Heads with several learning rates that start from the same weights and share one normalisation of the features.

    Batch normalisation uses the statistics of the batch in training, and the running statistics in evaluation. Each
    device has its own statistics, and evaluation uses those of the first device, as in MAE's code.

    Args:
        width: Width of the features that are normalised, F or D.
        learning_rates: R base learning rates for 256 images per step. Each head stores its rate as `lr_per_256`.
        make_head: Function that builds one head.
        normalisation: "batch": batch normalisation without affine parameters. Otherwise the heads get the features as
            they are: for "none", and for "layer", whose norm has weights and is a part of each head.
    """

    def __init__(
        self,
        width: int,
        learning_rates: Sequence[float],
        make_head: Callable[[], nn.Module],
        normalisation: Normalisation = "batch",
    ) -> None:
        super().__init__()
        self.learning_rates = list(learning_rates)
        self.normalisation = normalisation
        self.norm: nn.Module = nn.Identity()
        if normalisation == "batch":
            self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.heads = nn.ModuleList()
        for lr_per_256 in learning_rates:
            with torch.random.fork_rng(devices=[]):  # resets the generator for the next head
                head = make_head()
            head.lr_per_256 = lr_per_256  # type: ignore[assignment]  # HeadOptimizer.build reads it
            self.heads.append(head)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (R, B, C), float32, of vectors (B, F), or of the patches (B, D, L) of a map."""
        with torch.autocast(features.device.type, enabled=False):
            normalised = self.norm(features.float())
            return torch.stack([head(normalised) for head in self.heads])

    def hold_diverged(self) -> None:
        """Set the gradients of diverged heads to 0, so that their weights stay finite and the other heads train on.

        With MAE's batch, a base rate of 1.0 can double a weight every few steps, for thousands of steps.
        """
        for head, diverged in zip(self.heads, self.diverged(), strict=True):
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(diverged, 0.0)

    @torch.no_grad()
    def diverged(self) -> Tensor:
        """Return a mask of the diverged heads, (R,), bool."""
        norms = [torch.stack(torch._foreach_norm(list(head.parameters()))).max() for head in self.heads]
        return torch.stack(norms) > _NORM_LIMIT


def linear_sweeps(
    widths: Mapping[str, int], learning_rates: Sequence[float], num_classes: int, normalisation: Normalisation
) -> nn.ModuleDict:
    """Build a sweep of linear heads for each kind of features. `widths` maps names of kinds to widths F."""
    heads = {name: partial(_linear_head, width, num_classes, normalisation) for name, width in widths.items()}
    return nn.ModuleDict(
        {name: Sweep(width, learning_rates, heads[name], normalisation) for name, width in widths.items()}
    )


def _linear_head(width: int, num_classes: int, normalisation: Normalisation) -> nn.Module:
    head = LinearHead(width, num_classes)
    return nn.Sequential(nn.LayerNorm(width), head) if normalisation == "layer" else head


def attentive_sweep(width: int, learning_rates: Sequence[float], num_classes: int, num_heads: int) -> Sweep:
    """Build a sweep of attentive heads for maps of width D.

    Raises:
        UserError: If `num_heads` does not divide the width.
    """
    if num_heads < 1 or width % num_heads:
        raise UserError(f"LinearProbe: attentive_heads divides the {width} channels of the last map; got {num_heads}.")
    return Sweep(width, learning_rates, partial(AttentiveHead, width, num_classes, num_heads))
