"""Decoding: from the bytes of a sample to a tensor, transforms and augmentation, and batches.

It imports datamodules.labels, datamodules.files, datamodules.faults and base.
"""

from ssmpretrain.datamodules.decoding.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    Augmentation,
    check_crop_ratio,
    check_image_size,
)
from ssmpretrain.datamodules.decoding.batcher import Batcher, ImageBatch, PreparedSample
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

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "Augmentation",
    "Batcher",
    "DecodedSample",
    "ImageBatch",
    "ImageTransform",
    "Photometric",
    "PreparedSample",
    "check_crop_ratio",
    "check_image_size",
    "check_pixels",
    "check_sample",
    "decode_rgb",
    "decode_sample",
]
