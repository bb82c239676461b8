"""Mixup and CutMix of a batch; the draw is a function of the batch's number alone."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data.mixup import Mixup
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.seeds import numpy_seeded


def mix(mixup: Mixup, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Blend every image with the one at its mirror place in the batch, or paste a rectangle of that one into it.

    Args:
        mixup: timm's settings.
        images: (B, 3, H, W), B even; not changed.
        labels: (B,), int64.
        numbers: What the draw depends on, each from 0 to 2**32 - 1, such as seed, batch and rank.

    Returns:
        The images, and soft targets (B, num_classes), float32, that sum to 1.

    Raises:
        ValueError: If the batch is odd.

    Source: Zhang et al., "mixup" (arXiv:1710.09412); Yun et al., "CutMix" (arXiv:1905.04899).
    """
    if len(images) % 2:
        raise UserError(
            f"Finetune: mixup and cutmix pair the images of a batch; got a batch of {len(images)} images. "
            "Set data.batch_size to an even number, or mixup and cutmix to 0."
        )
    with numpy_seeded(numbers):  # timm's Mixup draws from NumPy's global generator
        return mixup(images.clone(), labels)  # type: ignore[no-any-return]  # it works in place
