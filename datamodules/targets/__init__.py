"""Targets of dense tasks: class maps and objects, decoded, augmented together with their image, and stacked.

It imports decoding, labels, faults and base. The data modules in dense/ and the verification of shards read with it.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.targets.batches import IGNORED, Annotation, DetectionBatch, Objects, SegmentationBatch
    from ssmpretrain.datamodules.targets.detection import DetectionBatcher
    from ssmpretrain.datamodules.targets.detection_transforms import (
        DetectionAugmentation,
        LargeScaleJitter,
        MultiScaleResize,
    )
    from ssmpretrain.datamodules.targets.distortion import Distortion
    from ssmpretrain.datamodules.targets.segmentation import SegmentationBatcher
    from ssmpretrain.datamodules.targets.segmentation_transforms import SegmentationAugmentation

__all__ = [
    "IGNORED",
    "Annotation",
    "DetectionAugmentation",
    "DetectionBatch",
    "DetectionBatcher",
    "Distortion",
    "LargeScaleJitter",
    "MultiScaleResize",
    "Objects",
    "SegmentationAugmentation",
    "SegmentationBatch",
    "SegmentationBatcher",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Annotation": "batches",
        "DetectionAugmentation": "detection_transforms",
        "DetectionBatch": "batches",
        "DetectionBatcher": "detection",
        "LargeScaleJitter": "detection_transforms",
        "MultiScaleResize": "detection_transforms",
        "Distortion": "distortion",
        "IGNORED": "batches",
        "Objects": "batches",
        "SegmentationAugmentation": "segmentation_transforms",
        "SegmentationBatch": "batches",
        "SegmentationBatcher": "segmentation",
    },
)
