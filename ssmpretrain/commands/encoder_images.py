"""The images that an encoder takes, and making it take another size."""

from __future__ import annotations

from typing import Any

from timm.data.config import resolve_model_data_config
from torch import nn


def usual_images(encoder: nn.Module) -> dict[str, Any]:
    """What timm says of the images that an encoder takes; the size is the one that it was built for, if any.

    Returns:
        What a run's checkpoint calls `images`: size (height, width), mean, std, interpolation, crop_pct.
    """
    config = resolve_model_data_config(encoder)  # type: ignore[no-untyped-call]
    built_for = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    rest = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    return {"size": built_for or config["input_size"][1:], **rest}


def set_size(encoder: Any, name: str, size: tuple[int, int], *, where: str) -> None:
    """Make an encoder take images of H, W pixels.

    Raises:
        ValueError: If its stride does not divide them.
    """
    stride = encoder.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        near = max(1, round(size[0] / stride)) * stride
        raise ValueError(
            f"{where}: {name} takes images whose sides are multiples of {stride} pixels; got {size[0]} x {size[1]}. "
            f"Set --image-size {near}, say."
        )
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=size)
