"""Settings of the text tower of a contrastive objective: kind, size, source of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, check_widths
from ssmpretrain.encoders.vim.text import MambaText
from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer, text_transformer
from ssmpretrain.objectives.contrastive.text_weights import fill_text_tower

_MOST_TOKENS = 65_536


@dataclass
class TextTower:
    """Settings of the text tower. The defaults are those of CLIP's ViT-B models.

    Args:
        kind: "transformer" for CLIP's causal Transformer, or "mamba" for a stack of one-directional Mamba blocks.
        width: Channels, at least 1; a multiple of `heads` for "transformer".
        heads: Attention heads of "transformer".
        layers: Number of blocks, at least 1. A block of "mamba" has half the weights of a block of "transformer".
        context_length: Tokens of a caption with its start and end token, at least 3. Longer captions are cut and
            counted.
        quick_gelu: Whether the activation of "transformer" is OpenAI's x * sigmoid(1.702 x) instead of GELU.
        init_from: Source of the tower's weights: a run of CLIP, a folder in open_clip's format such as `export --format
            open_clip` writes, or a checkpoint of open_clip. None starts from scratch.
        locked: Whether to freeze the tower: no gradient, and evaluation mode also in training.

    Source: Radford et al., "CLIP" (arXiv:2103.00020), section 2.4; Gu & Dao, "Mamba" (arXiv:2312.00752).
    """

    kind: Literal["transformer", "mamba"] = "transformer"
    width: int = 512
    heads: int = 8
    layers: int = 12
    context_length: int = 77
    quick_gelu: bool = False
    init_from: str | None = None
    locked: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("transformer", "mamba"):
            raise UserError(f"TextTower: kind is transformer or mamba; got {self.kind!r}.")
        for name, least in (("width", 1), ("heads", 1), ("layers", 1), ("context_length", 3)):
            if getattr(self, name) < least:
                raise UserError(f"TextTower: {name} is at least {least}; got {getattr(self, name)}.")
        check_widths("TextTower", width=self.width)
        if self.layers > MOST_BLOCKS:
            raise UserError(f"TextTower: layers is at most {MOST_BLOCKS}; got {self.layers:,}.")
        if self.context_length > _MOST_TOKENS:
            raise UserError(f"TextTower: context_length is at most {_MOST_TOKENS:,}; got {self.context_length:,}.")
        if self.kind == "transformer" and self.width % self.heads:
            raise UserError(f"TextTower: width is a multiple of heads; got {self.width} and {self.heads}.")

        if self.kind == "mamba" and self.quick_gelu:
            raise UserError("TextTower: quick_gelu is the activation of a transformer; got kind mamba. Leave it out.")

    def build(self, embed_dim: int, tokenizer: Tokenizer) -> Any:
        """Build the tower, which maps tokens (T, L) to embeddings (T, embed_dim) that are not normalised.

        Args:
            embed_dim: E, width of the embeddings.
            tokenizer: Tokenizer, for the size of the vocabulary.

        Raises:
            ValueError: If `init_from` cannot be read or holds another text tower.
        """
        tower = self._fresh(embed_dim, tokenizer.vocab_size)
        if self.init_from is not None:
            settings: dict[str, Any] = {"kind": self.kind, "width": self.width, "layers": self.layers}
            settings["embed_dim"] = embed_dim
            if self.kind == "transformer":
                settings |= {name: getattr(self, name) for name in ("heads", "context_length", "quick_gelu")}
            fill_text_tower(tower, self.init_from, settings)
        return tower.requires_grad_(False).eval() if self.locked else tower

    def _fresh(self, embed_dim: int, vocab_size: int) -> Any:
        if self.kind == "mamba":
            return MambaText(self.context_length, vocab_size, self.width, self.layers, embed_dim)
        sizes = (self.context_length, vocab_size, self.width, self.heads, self.layers)
        return text_transformer(embed_dim, *sizes, quick_gelu=self.quick_gelu)
