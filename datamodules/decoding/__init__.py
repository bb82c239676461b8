"""Decoding: from the bytes of a sample to an image tensor, its augmentation, and batches.

It imports datamodules.labels, files, faults, and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.decoding.augmentation import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        INTERPOLATIONS,
        Augmentation,
        check_crop_ratio,
        check_image_size,
        check_normalisation,
    )
    from ssmpretrain.datamodules.decoding.batcher import Batcher, ImageBatch, PreparedSample
    from ssmpretrain.datamodules.decoding.captioned import CaptionBatcher, ImageTextBatch
    from ssmpretrain.datamodules.decoding.decode import (
        MAX_PIXELS,
        DecodedSample,
        check_pixels,
        check_sample,
        decode_rgb,
        decode_sample,
    )
    from ssmpretrain.datamodules.decoding.photometric import Photometric
    from ssmpretrain.datamodules.decoding.transform import ImageTransform
    from ssmpretrain.datamodules.decoding.views import ViewGroup, ViewsTransform

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "Augmentation",
    "Batcher",
    "CaptionBatcher",
    "DecodedSample",
    "ImageBatch",
    "ImageTextBatch",
    "ImageTransform",
    "Photometric",
    "PreparedSample",
    "ViewGroup",
    "ViewsTransform",
    "check_crop_ratio",
    "check_image_size",
    "check_normalisation",
    "check_pixels",
    "check_sample",
    "decode_rgb",
    "decode_sample",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Augmentation": "augmentation",
        "Batcher": "batcher",
        "CaptionBatcher": "captioned",
        "DecodedSample": "decode",
        "IMAGENET_MEAN": "augmentation",
        "IMAGENET_STD": "augmentation",
        "INTERPOLATIONS": "augmentation",
        "ImageBatch": "batcher",
        "ImageTextBatch": "captioned",
        "ImageTransform": "transform",
        "MAX_PIXELS": "decode",
        "Photometric": "photometric",
        "PreparedSample": "batcher",
        "ViewGroup": "views",
        "ViewsTransform": "views",
        "check_crop_ratio": "augmentation",
        "check_image_size": "augmentation",
        "check_normalisation": "augmentation",
        "check_pixels": "decode",
        "check_sample": "decode",
        "decode_rgb": "decode",
        "decode_sample": "decode",
    },
)
