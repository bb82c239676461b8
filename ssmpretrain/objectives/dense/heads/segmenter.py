"""Segmenter's mask transformer: class tokens attend to the patches, and score each of them.

Legend: B images, D channels, K classes, L = h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.dense.heads.head import Head, check_sizes

_HEAD_WIDTH = 64
_STD = 0.02


@dataclass
class Segmenter(Head):
    """Settings of Segmenter's mask transformer, the head of Vim's ablation of its blocks.

    The head reads one map, by default the last, and keeps its D channels. Its attention is quadratic in the patches.

    Args:
        depth: Transformer blocks, at least 1.
        num_heads: Attention heads; the number divides D. None takes D / 64, at least 1.
        mlp_ratio: Width of the hidden layer of a block as a multiple of D, above 0.
        dropout: Probability that a value is dropped, in the attention and after each layer, in [0, 1).

    Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation" (arXiv:2105.05633), section 3.2.
    """

    depth: int = 2
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    reads_pyramid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        heads = {} if self.num_heads is None else {"num_heads": self.num_heads}
        check_sizes("Segmenter", self.dropout, depth=self.depth, **heads)
        if not 0 < self.mlp_ratio <= 64:
            raise UserError(f"Segmenter: mlp_ratio is above 0, at most 64; got {self.mlp_ratio}. 4 is usual.")

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        D = channels[0]
        num_heads = self.num_heads or max(1, D // _HEAD_WIDTH)
        if D % num_heads:
            raise UserError(
                f"Segmenter: num_heads divides the {D} channels of the map; got {num_heads}. Set model.head.num_heads."
            )
        return MaskTransformer(D, num_classes, num_heads, self)


class MaskTransformer(nn.Module):
    """Turn one map (B, D, h, w) into logits (B, K, h, w); see `Segmenter`."""

    def __init__(self, D: int, num_classes: int, num_heads: int, settings: Segmenter) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, D))
        self.blocks = nn.Sequential(*(_block(D, num_heads, settings) for _ in range(settings.depth)))
        self.norm = nn.LayerNorm(D)
        self.patch_matrix = nn.Parameter(torch.randn(D, D) * D**-0.5)
        self.class_matrix = nn.Parameter(torch.randn(D, D) * D**-0.5)
        self.score_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.class_tokens, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are tokens."""
        return {"class_tokens"}

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        B, _, h, w = maps[0].shape
        patches = self.project(maps[0].flatten(2).mT)  # (B, L, D)
        tokens = self.norm(self.blocks(torch.cat([patches, self.class_tokens.expand(B, -1, -1)], dim=1)))
        patches = F.normalize(tokens[:, : h * w] @ self.patch_matrix, dim=-1)
        classes = F.normalize(tokens[:, h * w :] @ self.class_matrix, dim=-1)
        scores = self.score_norm(patches @ classes.mT)  # (B, L, K)
        return scores.mT.unflatten(2, (h, w))  # type: ignore[no-any-return]


def _block(D: int, num_heads: int, settings: Segmenter) -> Block:
    p = settings.dropout
    return Block(D, num_heads, settings.mlp_ratio, qkv_bias=True, proj_drop=p, attn_drop=p)
