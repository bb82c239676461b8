"""One pass of an encoder: one vector per image, and the map of its patches.

B images, H x W pixels, h x w positions of the last map, D channels
"""

from typing import Any, NamedTuple, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import UNKNOWN, family_of
from ssmpretrain.encoders.features.maps import freeze_after_map, freeze_all_but, normed_map
from ssmpretrain.encoders.features.pooled import Pooled, last_blocks, pool
from ssmpretrain.encoders.masking.stem import blank, masked_stem

# Values of `global_pool` with which an encoder's own head reads the class token, if there is one.
_OF_CLASS_TOKEN = ("token", "concat", "")


class Encoded(NamedTuple):
    """Features of images. D is `pooled_width(encoder, global_kind(encoder))`.

    Attributes:
        vector: Global features, (B, D), of the kind that `global_kind` names.
        map: Features of the patches, (B, D, h, w), after the final norm. If the encoder normalises pooled features
            instead of its map (ConvNeXt, MambaOut, a ViT with `fc_norm`), that norm is applied to every position, as
            DINOv3 does with ConvNeXt.
    """

    vector: Tensor
    map: Tensor


def global_kind(encoder: nn.Module) -> Pooled:
    """Return the kind of pooled feature that stands for a whole image.

    It is the class token, or the mean of Vim's registers, if the encoder's own head reads it. It is the mean of the
    last map if the encoder has no class token or was built with `global_pool="avg"`, followed by the encoder's norm of
    pooled features if it has one. So an encoder without a head gives the same vector, except a MambaOut, whose head
    keeps a hidden layer, and a ViT with attention pooling.
    """
    family = family_of(encoder)
    if family.has_class_token(encoder) and getattr(encoder, "global_pool", "token") in _OF_CLASS_TOKEN:
        return Pooled("class")
    return Pooled("mean" if family.pooled_norm_of(encoder) is None else "normed")


def encode(encoder: nn.Module, images: Tensor) -> Encoded:
    """Return the vector and the map of images in one pass of the encoder.

    Args:
        encoder: An encoder with timm's method `forward_intermediates`. It reads images of any size that fits its
            patches after `family_of(encoder).accept_any_size(encoder)`.
        images: Normalised images, (B, 3, H, W).
    """
    kind = global_kind(encoder)
    blocks = last_blocks(encoder, images, [kind])
    return Encoded(pool(encoder, blocks, [kind])[kind], normed_map(encoder, blocks[-1].map))


def encode_masked(encoder: nn.Module, images: Tensor, hidden: Tensor, mask_token: Tensor) -> Encoded:
    """Return the vector and the map of images whose hidden patches are mask tokens. No hidden pixel is read.

    Hidden pixels are set to 0 before the stem, whose convolutions may overlap. Then the token replaces the output of
    the stem at hidden positions, before positions are added. The sequence keeps all its places.

    Args:
        encoder: An encoder with a stem, see `require_stem`.
        images: Normalised images, (B, 3, H, W).
        hidden: True at hidden positions of the last map, (B, h, w), bool.
        mask_token: The mask token, (1, 1, 1, C), for the C channels of the stem.
    """
    with masked_stem(encoder, hidden, mask_token):
        return encode(encoder, blank(images, hidden))


def freeze_unread(encoder: nn.Module) -> None:
    """Freeze the parameters of an encoder that `encode` does not read, such as those of a head.

    They get no gradient, and distributed training would wait for their gradients. An encoder of an unknown family
    computes one image of its own size to find them.

    Raises:
        UserError: If the encoder lacks timm's `forward_intermediates` or `feature_info`, or gives no map.
    """
    for name in ("forward_intermediates", "feature_info"):
        if not hasattr(encoder, name):
            raise UserError(
                f"{_name_of(encoder)}: one pass for vector and map needs timm's {name}, which {type(encoder).__name__} "
                "lacks. Choose another encoder."
            )
    family = family_of(encoder)
    if family is UNKNOWN:
        freeze_all_but(encoder, _tried(encoder))
        return
    freeze_after_map(encoder)
    if (known := family.pooled_norm_of(encoder)) is not None and global_kind(encoder).pooling == "normed":
        cast(Any, known[0]).requires_grad_(True)


def _tried(encoder: nn.Module) -> Encoded:
    """Return the features of one black image of the encoder's own size.

    Raises:
        UserError: If the encoder gives no map.
    """
    size = get_model_input_config(encoder)["input_size"]
    weight, was_training = next(encoder.parameters()), encoder.training
    try:
        with torch.enable_grad():
            return encode(encoder.eval(), weight.new_zeros(1, *size))
    except Exception as error:  # the encoder may be of any package
        raise UserError(
            f"{_name_of(encoder)}: an encoder gives its last map by forward_intermediates; this one fails with "
            f"{size[1]} x {size[2]} pixels ({(str(error) or type(error).__name__).splitlines()[0]:.120}). Choose "
            "another encoder."
        ) from error
    finally:
        encoder.train(was_training)


def check_view_size(encoder: nn.Module, size: int | tuple[int, int]) -> None:
    """Raise a `UserError` if the positions of the encoder's last map do not cover views of a size exactly.

    Args:
        encoder: The encoder. If no rule is known for its family, every size passes.
        size: Size of the views in pixels, one number or (height, width).
    """
    if (sides := family_of(encoder).view_sides(encoder)) is None:
        return
    smallest, step = sides
    for side in (size, size) if isinstance(size, int) else size:
        if side != smallest and (side < smallest or not step or (side - smallest) % step):
            raise UserError(_wrong_side(_name_of(encoder), side, smallest, step))


def _wrong_side(name: str, side: int, smallest: int, step: int) -> str:
    if not step:
        return (
            f"{name}: it reads images of {smallest} x {smallest} pixels only; got a side of {side}. Use views of "
            f"{smallest}, set encoder_args.img_size if it has this argument, or choose another encoder."
        )
    below = smallest + max((side - smallest) // step, 0) * step
    nearest = f"{below} or {below + step}" if below < side else f"{below}"
    rule = f"multiples of {step} pixels" if smallest % step == 0 else f"{smallest} pixels plus a multiple of {step}"
    least = f", at least {smallest}" if smallest > step else ""
    return (
        f"{name}: the sides of a view are {rule}{least}, so that the patches of the last map cover it exactly; got "
        f"{side}. Use {nearest}."
    )


def _name_of(encoder: nn.Module) -> str:
    named: Any = getattr(encoder, "pretrained_cfg", None) or {}
    return named.get("architecture") or type(encoder).__name__
