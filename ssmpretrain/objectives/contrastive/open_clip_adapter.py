"""The one file that imports open_clip (`<4`): text tower, losses, names of classes, tokenizer, loader.

It imports open_clip where it uses it, so that other objectives train on a machine without the package.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.timm_name import args_in_timm_name
from ssmpretrain.encoders.weights.build import check_described
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.objectives.contrastive.byte_pairs import merge_pairs
from ssmpretrain.objectives.contrastive.text_weights import OPEN_CLIP_CONFIG, read_open_clip_config

_LOCAL_NAME = re.compile(r"[^:/\\]+")  # a name, rather than a place on a hub or a disk such as "hf-hub:a/b"
_WEIGHTS = (".safetensors", ".bin", ".pth")  # in the order in which open_clip looks for them
_MOST_WORDS = 1 << 18  # words that the tokenizer caches; open_clip's own cache has no limit
_LONG_WORD = 64  # bytes; a longer word is not cached, and is encoded in almost linear time


def _encoder(context_length: int) -> Any:
    """Build open_clip's tokenizer, made fast for long words; one of 30,000 letters (a pasted file) would take 13 s."""
    from open_clip.tokenizer import SimpleTokenizer

    encoder = SimpleTokenizer(context_length=context_length)
    encoder.bpe = partial(_bpe, encoder)
    return encoder


def _bpe(encoder: Any, token: str) -> str:
    if len(token) <= _LONG_WORD:
        return type(encoder).bpe(encoder, token)  # type: ignore[no-any-return]
    return " ".join(merge_pairs([*token[:-1], f"{token[-1]}</w>"], encoder.bpe_ranks))


class Tokenizer:
    """Encode texts by CLIP's byte pairs, between a start and an end token, and pad them with zeros.

    Args:
        context_length: L, number of tokens of a text, at least 3.
    """

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._encoder = _encoder(context_length)
        self.vocab_size: int = self._encoder.vocab_size

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode T texts of any length.

        Returns:
            Tokens (T, L), int64, equal to open_clip's; and flags (T,), bool, that mark texts that were cut.
        """
        if len(self._encoder.cache) > _MOST_WORDS:
            self._encoder.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
        tokens: Tensor = self._encoder(texts, self.context_length + 1)
        cut = tokens[:, -1] != 0
        tokens = tokens[:, :-1].contiguous()
        tokens[cut, -1] = self._encoder.eot_token_id
        return tokens, cut


def text_transformer(
    embed_dim: int, context_length: int, vocab_size: int, width: int, heads: int, layers: int, quick_gelu: bool = False
) -> Any:
    """Build CLIP's causal Transformer, which maps tokens (T, L) to embeddings (T, embed_dim) of the end token."""
    from open_clip.transformer import QuickGELU, TextTransformer

    activation = QuickGELU if quick_gelu else nn.GELU
    sizes = (context_length, vocab_size, width, heads, layers)
    return TextTransformer(*sizes, output_dim=embed_dim, act_layer=activation)


def contrastive_loss(kind: str, rank: int, world: int) -> Any:
    """Build CLIP's or SigLIP's loss over the pairs of all ranks.

    Gradients that are averaged over the ranks, as in DDP, equal those of one process with all pairs. open_clip's
    default for CLIP computes no gradients through the embeddings of other ranks, and gives half of that.

    Args:
        kind: "clip" or "siglip".
        rank: Number of this process.
        world: Number of processes.

    Returns:
        A module to be called with image and text embeddings (n, E), the factor of the similarities and, for SigLIP,
        their bias.
    """
    from open_clip.loss import ClipLoss, SigLipLoss

    if kind == "siglip":
        return SigLipLoss(rank=rank, world_size=world)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)


def imagenet_names() -> list[str]:
    """Return OpenAI's English names of the 1000 classes of ImageNet-1k, in the order of their labels."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def imagenet_templates(kind: str) -> list[str]:
    """Return sentences with {} for a name: the 80 for ImageNet ("openai"), or the best seven of them ("simple")."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if kind == "openai" else SIMPLE_IMAGENET_TEMPLATES
    return [template("{}") for template in templates]


def load_open_clip(folder: str | Path) -> Any:
    """Load the model in a folder with `open_clip.create_model`. timm must know the encoders of this package.

    Raises:
        ValueError: If the folder is incomplete or damaged, if the described model is larger than its weights, if it
            names a model at another place, or if a weight is NaN or infinite.
    """
    folder = Path(folder)
    model, text, _ = read_open_clip_config(folder / OPEN_CLIP_CONFIG)
    image = model.get("vision_cfg", {})
    weights = next((path for suffix in _WEIGHTS for path in sorted(folder.glob(f"*{suffix}")) if path.is_file()), None)
    if weights is None:
        raise UserError(f"open_clip: {folder} has a configuration and no weights. Write it anew, or fetch it again.")
    for name in (image.get("timm_model_name"), text.get("hf_model_name")):
        if name is not None and not (isinstance(name, str) and _LOCAL_NAME.fullmatch(name)):
            raise UserError(f"open_clip: {folder} names a model that timm has; got {name!r:.100}. Do not load it.")
    content = read_content(weights)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = state if isinstance(state, dict) else {}
    try:
        settings = {**model, "image tower": args_in_timm_name(image.get("timm_model_name"))}
    except ValueError as error:
        raise UserError(f"open_clip: {folder}: {error}") from error
    check_described("its model is open_clip's", settings, tensors, folder, lambda: _created(folder, empty=True))
    created = _created(folder)
    check_finite("open_clip", created.state_dict(), folder)
    return created


def _created(folder: Path, *, empty: bool = False) -> Any:
    from open_clip import create_model

    options: dict[str, Any] = {"load_weights": False, "device": "meta"} if empty else {}
    try:
        return create_model(f"local-dir:{folder}", **options)
    except Exception as error:  # open_clip, timm or torch fail in many ways on damaged files
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"open_clip: the model in {folder} cannot be loaded ({said:.300}). "
            "Write the folder anew: export --format open_clip; or fetch it again."
        ) from error
