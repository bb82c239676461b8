"""Data modules of dense tasks: segmentation from folders and shards, detection from COCO files and shards.

It imports splits, order, shards, targets and base, as the other data modules do.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.dense.coco_detection import CocoDetection
    from ssmpretrain.datamodules.dense.detection_shards import DetectionShards
    from ssmpretrain.datamodules.dense.segmentation_folder import SegmentationFolder
    from ssmpretrain.datamodules.dense.segmentation_shards import SegmentationShards

__all__ = ["CocoDetection", "DetectionShards", "SegmentationFolder", "SegmentationShards"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CocoDetection": "coco_detection",
        "DetectionShards": "detection_shards",
        "SegmentationFolder": "segmentation_folder",
        "SegmentationShards": "segmentation_shards",
    },
)
