"""Data modules: images from shards or folders, read in a planned order, with exact resume and counts of bad samples.

Each folder below is one subject. Of the other rooms, data modules import base alone. Names are loaded on first use, so
that packing shards does not import Lightning.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.decoding.views import ViewGroup
    from ssmpretrain.datamodules.dense.coco_detection import CocoDetection
    from ssmpretrain.datamodules.dense.detection_shards import DetectionShards
    from ssmpretrain.datamodules.dense.segmentation_folder import SegmentationFolder
    from ssmpretrain.datamodules.dense.segmentation_shards import SegmentationShards
    from ssmpretrain.datamodules.image_data import ImageData
    from ssmpretrain.datamodules.image_folder import ImageFolder
    from ssmpretrain.datamodules.image_shards import ImageShards
    from ssmpretrain.datamodules.image_text_shards import ImageTextShards
    from ssmpretrain.datamodules.synthetic.digits import Digits
    from ssmpretrain.datamodules.synthetic.scenes import DetectionScenes, Scenes, SegmentationScenes
    from ssmpretrain.datamodules.synthetic.shapes import Shapes
    from ssmpretrain.datamodules.targets.detection_transforms import LargeScaleJitter, MultiScaleResize

__all__ = [
    "CocoDetection",
    "DetectionScenes",
    "DetectionShards",
    "Digits",
    "ImageData",
    "ImageFolder",
    "ImageShards",
    "ImageTextShards",
    "LargeScaleJitter",
    "MultiScaleResize",
    "Scenes",
    "SegmentationFolder",
    "SegmentationScenes",
    "SegmentationShards",
    "Shapes",
    "ViewGroup",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CocoDetection": "dense.coco_detection",
        "DetectionScenes": "synthetic.scenes",
        "DetectionShards": "dense.detection_shards",
        "Digits": "synthetic.digits",
        "ImageData": "image_data",
        "ImageFolder": "image_folder",
        "ImageShards": "image_shards",
        "ImageTextShards": "image_text_shards",
        "LargeScaleJitter": "targets.detection_transforms",
        "MultiScaleResize": "targets.detection_transforms",
        "SegmentationFolder": "dense.segmentation_folder",
        "SegmentationShards": "dense.segmentation_shards",
        "Scenes": "synthetic.scenes",
        "SegmentationScenes": "synthetic.scenes",
        "Shapes": "synthetic.shapes",
        "ViewGroup": "decoding.views",
    },
)
