"""The head of DINO: from features to logits over prototypes.

Legend: N features, D encoder width, E width of the bottleneck, K prototypes
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError

LastLayer = Literal["unit", "scaled", "plain"]


class Prototypes(nn.Module):
    """The last layer: the logit of prototype k is the product of the features with `w_k`; there is no bias.

    The logits are float32, also under autocast: divided by a temperature of 0.04, the rounding of bfloat16 would move
    them by up to 0.1.

    Args:
        width: E, length of the features.
        num_prototypes: K.
        kind: "unit" for vectors `w_k` of length 1 (DINO's `norm_last_layer`), "scaled" for vectors with a trained
            length that starts at 1 (`norm_last_layer: false`), "plain" for unrestricted vectors (DINOv3).

    Attributes:
        weight: Directions of the prototypes, (K, E); the vectors themselves for "plain".
        scale: Their lengths, (K, 1), for "scaled", otherwise None.
    """

    scale: nn.Parameter | None

    def __init__(self, width: int, num_prototypes: int, kind: LastLayer) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(num_prototypes, width))
        if kind == "plain":
            nn.init.trunc_normal_(self.weight, std=0.02)
        else:
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        self.register_parameter("scale", nn.Parameter(torch.ones(num_prototypes, 1)) if kind == "scaled" else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K), float32, of features (N, E)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight if self.kind == "plain" else F.normalize(self.weight, dim=-1)
            return F.linear(x.float(), (weight if self.scale is None else self.scale * weight).float())


class DINOHead(nn.Module):
    """Map features to logits over prototypes: three linear layers with GELU between, unit length, prototypes.

    There is no batch normalisation. The state dict has `mlp.{0,2,4}.{weight,bias}`, `last_layer.weight`, with "scaled"
    also `last_layer.scale`, and those of a separate head of the patches under `patch.`.

    Args:
        width: D, width of the encoder.
        num_prototypes: K, at least 2.
        hidden_dim: Width of the hidden layers, at least 1.
        bottleneck_dim: E, at least 1.
        last_layer: Kind of the last layer, see `Prototypes`.
        patch: Head of the patches; None if this head also maps patches.

    Raises:
        UserError: If an argument is out of range.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv:2104.14294), appendix C.
    """

    patch: DINOHead | None

    def __init__(
        self,
        width: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        last_layer: LastLayer = "unit",
        patch: DINOHead | None = None,
    ) -> None:
        if last_layer not in get_args(LastLayer):
            raise UserError(f"DINOHead: last_layer is unit, scaled or plain; got {last_layer!r}. DINO's is unit.")
        for name, value, least in (
            ("num_prototypes", num_prototypes, 2), ("hidden_dim", hidden_dim, 1), ("bottleneck_dim", bottleneck_dim, 1),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"DINOHead: {name} is at least {least}; got {value}. Enlarge it.")
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, last_layer)
        self.patch = patch

    @property
    def of_patches(self) -> DINOHead:
        """The head that maps patches: a separate one, or this one."""
        return self if self.patch is None else self.patch

    @property
    def last_layers(self) -> list[Prototypes]:
        """The last layers of this head and of a separate head of the patches."""
        return [head.last_layer for head in (self, self.patch) if head is not None]

    def project(self, x: Tensor) -> Tensor:
        """Return the features (N, E) of length 1, float32, that the last layer reads, of features (N, D)."""
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K), float32, of features (N, D)."""
        logits: Tensor = self.last_layer(self.project(x))
        return logits
