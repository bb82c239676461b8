"""What the entry points of our encoders share: arguments of timm's builder, and weights that timm reads, fitted."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.pyramid import SimplePyramid
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.pos_embed import resize_pos_embed, square_side
from ssmpretrain.encoders.weights.finite import check_finite

# Arguments of timm's encoders that ours take for what they are already; see `build`.
TIMMS_OWN = ("dynamic_img_size", "dynamic_img_pad", "output_stride")
FEATURE_CLASSES = ("getter", "hook", "fx")
PYRAMID = "pyramid"  # of those that keep one sequence

Encoder = TypeVar("Encoder", bound=nn.Module)


def build(
    model_class: type[Encoder],
    variant: str,
    sizes: Mapping[str, Any],
    pretrained: bool,
    kwargs: dict[str, Any],
    *,
    out_indices: int | tuple[int, ...],
    stride: int,
    feature_cls: str = "getter",
) -> Encoder:
    """Build an encoder as timm's entry points do.

    Args:
        model_class: Its class.
        variant: Its registered name.
        sizes: The arguments that the name stands for.
        pretrained: Whether to fill it, from where its configuration says.
        kwargs: What the caller asks for besides: arguments of the encoder, of timm's builder, and of timm's encoders.
            Of these `dynamic_img_size` changes nothing, as images of any size are taken.
        out_indices: The features that `features_only` gives when the caller names none.
        stride: Pixels from one position of the last features to the next.
        feature_cls: What `features_only` gives when the caller does not say: timm's words, or "pyramid" for
            `SimplePyramid`.

    Raises:
        ValueError: If the encoder has no counterpart of what timm's have.
    """
    kwargs = {**sizes, **kwargs}
    kwargs.pop("dynamic_img_size", None)
    if kwargs.pop("dynamic_img_pad", False):
        raise UserError(f"{variant}: images are not padded; got dynamic_img_pad=True. Pad or resize them before.")
    kind = kwargs.pop("feature_cls", feature_cls)
    if kind == PYRAMID and kwargs.get("features_only"):
        stride *= 2
    if (asked := kwargs.pop("output_stride", None)) not in (None, stride):
        raise UserError(
            f"{variant}: the last features have a stride of {stride} pixels, and no other; got output_stride={asked}. "
            "Leave it out."
        )
    kinds = (*FEATURE_CLASSES, PYRAMID) if issubclass(model_class, SequenceEncoder) else FEATURE_CLASSES
    if isinstance(kind, str) and kind not in kinds:
        raise UserError(f"{variant}: feature_cls is one of {', '.join(kinds)}; got {kind!r}. Leave it out.")
    levels = 4 if kind == PYRAMID else out_indices
    feature_cfg = {
        "out_indices": kwargs.pop("out_indices", levels),
        "feature_cls": SimplePyramid if kind == PYRAMID else kind,
    }
    return build_model_with_cfg(
        model_class, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=_fitted, **kwargs
    )


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict that timm has read, its positions resized for the encoder's images.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    cfg: Any = model.pretrained_cfg
    check_finite("timm", state, f"the weights of {cfg['architecture']}")
    table = state.get("pos_embed")
    if not isinstance(model, SequenceEncoder) or table is None or table.shape == model.pos_embed.shape:
        return state
    grid = _grid(table, model, cfg["input_size"][1:])
    if grid is None:
        return state  # timm will report the shape
    return {**state, "pos_embed": resize_pos_embed(table, grid, model.patch_embed.grid_size, model.class_token)}


def _grid(table: Tensor, model: SequenceEncoder, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of patches that a table was made for: that of the images of its weights, or else a square."""
    patch, stride = model.patch_embed.patch_size, model.patch_embed.stride
    height, width = ((pixels - patch) // stride + 1 for pixels in size)
    if table.ndim == 3 and math.prod((height, width)) + model.num_class_tokens == table.shape[1]:
        return height, width
    side = square_side(table, model.class_token)
    return None if side is None else (side, side)
