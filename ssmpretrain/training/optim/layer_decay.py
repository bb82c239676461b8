"""Layer numbers of parameters, for learning rates that fall towards the input of an encoder."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import nn

from ssmpretrain.base.errors import UserError


def layer_numbers(module: nn.Module) -> dict[str, int]:
    """Return the number of the layer of every parameter of `module`, by name, from 0 for the embeddings of its encoder.

    The last layer is the head. All parameters after the encoder's blocks belong to it, including the final norm, and
    all parameters of `module` outside the encoder. A layer between two stages of a pyramid belongs to the last block
    before it.

    Raises:
        ValueError: If no encoder in `module` has `group_matcher`.

    Source: Bao et al., "BEiT" (arXiv:2106.08254), and the code of MAE (facebookresearch/mae, util/lr_decay.py); for
        pyramids that of SimMIM (microsoft/SimMIM, optimizer.py, get_swin_layer).
    """
    for prefix, child in module.named_modules():
        if callable(matcher := getattr(child, "group_matcher", None)):
            within = group_parameters(child, _published(matcher()), reverse=True)
            layers = {f"{prefix}.{name}" if prefix else name: layer for name, layer in within.items()}
            top = max(layers.values())
            return {name: layers.get(name, top) for name, _ in module.named_parameters()}
    raise UserError(
        f"layer decay: an encoder names its layers in `group_matcher()`; got none in {type(module).__name__}. "
        "Set layer_decay to 1, or use an encoder of timm's interface."
    )


def _published(matcher: dict[str, Any]) -> dict[str, Any]:
    """Change timm's assignment of layers to the published one.

    timm assigns the final norm to the last block, and the downsampling of a stage to the block after it. The published
    rules assign the norm to the head, and the downsampling to the block before it.
    """
    kept = {}
    for group, patterns in matcher.items():
        named = isinstance(patterns, list | tuple)
        kept[group] = [_joined(*entry) for entry in patterns if not entry[0].startswith("^norm")] if named else patterns
    return kept


def _joined(pattern: str, place: Any) -> tuple[str, Any]:
    if "downsample" in pattern and place == (0,):  # in timm, at the head of the stage that follows
        return pattern, (-1, *MATCH_PREV_GROUP)
    return pattern, place
