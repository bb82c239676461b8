"""Synthetic data that need no download: digits on photographs, shapes with captions, scenes with masks and boxes.

It imports the data modules and the folders below them.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.synthetic.digits import Digits
    from ssmpretrain.datamodules.synthetic.scenes import DetectionScenes, Scenes, SegmentationScenes
    from ssmpretrain.datamodules.synthetic.shapes import Shapes

__all__ = ["DetectionScenes", "Digits", "Scenes", "SegmentationScenes", "Shapes"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DetectionScenes": "scenes",
        "Digits": "digits",
        "Scenes": "scenes",
        "SegmentationScenes": "scenes",
        "Shapes": "shapes",
    },
)
