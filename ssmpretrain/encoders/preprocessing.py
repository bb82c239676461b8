"""How images are prepared for an encoder: the entry `images` of a file, and timm's `pretrained_cfg`."""

from collections.abc import Mapping
from typing import Any, cast

from timm.data.config import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

# What timm recommends for evaluating its own weights, of no meaning for others.
_OF_TIMMS_WEIGHTS = ("test_input_size", "test_crop_pct", "test_pool_size")


def images_of(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for an encoder, as a file says it.

    Returns:
        size: [height, width], pixels.
        mean, std: One number per channel, of pixels in [0, 1].
        interpolation: How images are resized, such as "bicubic".
        crop_pct: Side of the central crop as a part of the shorter side of the resized image, in (0, 1].
    """
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    size = get_model_input_config(model)["input_size"][1:]
    images = {"size": list(size), "mean": list(config["mean"]), "std": list(config["std"])}
    return {**images, "interpolation": config["interpolation"], "crop_pct": config["crop_pct"]}


def remember_images(model: nn.Module, images: Mapping[str, Any]) -> None:
    """Make `timm.data.resolve_model_data_config(model)` answer as a file says; what it leaves out stays the name's.

    Args:
        model: An encoder, or a timm wrapper that gives its features.
        images: As `images_of` returns it, or a part of that. An encoder that is built for one size keeps its own.
    """
    cfg: dict[str, Any] = dict(cast("dict[str, Any]", model.pretrained_cfg))
    given = {key: images[key] for key in ("mean", "std", "interpolation", "crop_pct") if images.get(key) is not None}
    cfg |= {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    traits = cast("dict[str, Any]", getattr(model, "_traits", {}))
    size = traits.get("img_size") or images.get("size") or cfg["input_size"][1:]
    channels = get_model_input_config(model)["input_size"][0]
    if images or (channels, *size) != tuple(cfg["input_size"]):
        cfg = {key: value for key, value in cfg.items() if key not in _OF_TIMMS_WEIGHTS}
    cfg["input_size"] = (channels, *size)
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
