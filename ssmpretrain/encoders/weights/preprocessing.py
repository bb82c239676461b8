"""Image preprocessing of an encoder: the entry `images` of a file, and the encoder's `pretrained_cfg` of timm."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from timm.data.config import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

from ssmpretrain.base.errors import UserError

_MOST_CHANNELS, _MOST_PIXELS = 1024, 8192
_REMEDY = "Export the file again, or download it again."
# Settings that timm recommends for the evaluation of its own weights. They do not fit other weights.
_OF_TIMMS_WEIGHTS = ("test_input_size", "test_crop_pct", "test_pool_size")


def images_of(model: nn.Module) -> dict[str, Any]:
    """Return the image preprocessing of an encoder, as JSON values.

    Returns:
        size: [height, width], pixels.
        mean, std: One number per channel, of pixels in [0, 1].
        interpolation: Method that resizes images, such as "bicubic".
        crop_pct: Side of the central crop divided by the shorter side of the resized image, in (0, 1].
    """
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    size = get_model_input_config(model)["input_size"][1:]
    images = {"size": list(size), "mean": list(config["mean"]), "std": list(config["std"])}
    return {**images, "interpolation": config["interpolation"], "crop_pct": config["crop_pct"]}


def checked_images(images: Any, path: str | Path) -> dict[str, Any]:
    """Check the image preprocessing in a file and return it; an empty dictionary if the file has none.

    Args:
        images: The entry `images` of the file, or None.
        path: Path of the file, used in error messages.

    Raises:
        ValueError: If a value has the wrong type or is out of range; see `images_of` for the right ones.
    """
    if images is None:
        return {}
    if not isinstance(images, Mapping):
        raise UserError(f"checkpoint: the entry images of {path} is a dictionary; got {images!r:.80}. {_REMEDY}")
    for name, (is_right, what) in _IMAGES.items():
        value = images.get(name)
        if value is not None and not is_right(value):
            raise UserError(f"checkpoint: the entry images.{name} of {path} is {what}; got {value!r:.80}. {_REMEDY}")
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
    "eval_size": (_are_pixels, f"[short side, longest side] in pixels, from 1 to {_MOST_PIXELS:,}"),
    "antialias": (lambda value: isinstance(value, bool), "true or false"),
}


def remember_images(model: nn.Module, images: Mapping[str, Any]) -> None:
    """Store the image preprocessing of a file in an encoder, where `timm.data.resolve_model_data_config` reads it.

    Args:
        model: An encoder, or timm's wrapper of its features. Its `pretrained_cfg` is replaced.
        images: Result of `images_of`, or some of its entries. The other values stay the defaults of the encoder's name.
            `size` has no effect if the encoder was built for one image size.
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
