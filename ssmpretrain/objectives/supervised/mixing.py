"""Mixup and CutMix of a batch. The random draw depends only on given numbers."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data.mixup import Mixup
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.seeds import numpy_seeded


def mix(mixup: Mixup, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mix each image with the one at the mirrored place in the batch, by blending (mixup) or pasting (CutMix).

    Args:
        mixup: Settings, an object of timm.
        images: Images (B, 3, H, W) with even B; not changed.
        labels: Labels (B,), int64.
        numbers: Numbers that the random draw depends on, such as seed, batch and rank; each from 0 to 2**32 - 1.

    Returns:
        The mixed images (B, 3, H, W), and soft targets (B, num_classes), float32, that sum to 1.

    Raises:
        ValueError: If the number of images is odd.

    Source: Zhang et al., "mixup" (arXiv:1710.09412); Yun et al., "CutMix" (arXiv:1905.04899).
    """
    if len(images) % 2:
        raise UserError(
            f"Finetune: mixup and cutmix pair the images of a batch; got a batch of {len(images)} images. "
            "Set data.batch_size to an even number, or mixup and cutmix to 0."
        )
    with numpy_seeded(numbers):  # timm's Mixup draws from NumPy's global generator
        return mixup(images.clone(), labels)  # type: ignore[no-any-return]  # it works in place
