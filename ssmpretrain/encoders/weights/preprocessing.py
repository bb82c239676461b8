"""Image preprocessing of an encoder: the entry `images` of a file, and timm's `pretrained_cfg`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from timm.data.config import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

from ssmpretrain.base.errors import UserError

_MOST_CHANNELS, _MOST_PIXELS = 1024, 8192
_REMEDY = "Write the file anew, or fetch it again."
# What timm recommends for evaluating its own weights, of no meaning for others.
_OF_TIMMS_WEIGHTS = ("test_input_size", "test_crop_pct", "test_pool_size")


def images_of(model: nn.Module) -> dict[str, Any]:
    """Return the image preprocessing of an encoder, as files hold it.

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


def checked_images(images: Any, path: str | Path) -> dict[str, Any]:
    """Check a file's image preprocessing for the kinds of values that `images_of` gives; empty if it has none.

    Raises:
        ValueError: If a value is of another kind or out of range.
    """
    if images is None:
        return {}
    if not isinstance(images, Mapping):
        raise UserError(f"checkpoint: {path} says how its images are prepared by name; got {images!r:.80}. {_REMEDY}")
    for name, (is_right, what) in _IMAGES.items():
        value = images.get(name)
        if value is not None and not is_right(value):
            raise UserError(f"checkpoint: {path} says of its images {name}, {what}; got {value!r:.80}. {_REMEDY}")
    return dict(images)


def _are_numbers(value: Any, least: float) -> bool:
    numbers = isinstance(value, list | tuple) and 0 < len(value) <= _MOST_CHANNELS
    return numbers and all(isinstance(one, int | float) and least < one < math.inf for one in value)


def _are_pixels(value: Any) -> bool:
    two = isinstance(value, list | tuple) and len(value) == 2
    return two and all(type(one) is int and 0 < one <= _MOST_PIXELS for one in value)


_IMAGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (_are_pixels, f"[height, width] in pixels, from 1 to {_MOST_PIXELS:,}"),
    "mean": (lambda value: _are_numbers(value, -math.inf), "a number for each channel"),
    "std": (lambda value: _are_numbers(value, 0.0), "a number above 0 for each channel"),
    "interpolation": (lambda value: isinstance(value, str), "a word"),
    "crop_pct": (lambda value: isinstance(value, int | float) and 0 < value < math.inf, "a number above 0"),
}


def remember_images(model: nn.Module, images: Mapping[str, Any]) -> None:
    """Make `timm.data.resolve_model_data_config(model)` answer as a file says; the rest stays as the name says.

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
