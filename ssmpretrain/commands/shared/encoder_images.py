"""Making an encoder take images of another size."""

from __future__ import annotations

from typing import Any

from ssmpretrain.base.errors import UserError


def set_size(encoder: Any, name: str, size: tuple[int, int], *, where: str) -> None:
    """Make an encoder take images of H, W pixels.

    Raises:
        ValueError: If its stride does not divide them.
    """
    stride = encoder.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        near = max(1, round(size[0] / stride)) * stride
        raise UserError(
            f"{where}: {name} takes images whose sides are multiples of {stride} pixels; got {size[0]} x {size[1]}. "
            f"Set --image-size {near}, say."
        )
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=size)
