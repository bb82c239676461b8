"""Splits: images of training or validation, found and checked, and the base class of data modules that read them.

It imports every other folder of datamodules but synthetic, and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.splits.by_path import open_split
    from ssmpretrain.datamodules.splits.folder_split import FolderSplit
    from ssmpretrain.datamodules.splits.image_split import ImageSplit
    from ssmpretrain.datamodules.splits.planned_data import PlannedData
    from ssmpretrain.datamodules.splits.shard_split import ShardSplit

__all__ = ["FolderSplit", "ImageSplit", "PlannedData", "ShardSplit", "open_split"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FolderSplit": "folder_split",
        "ImageSplit": "image_split",
        "PlannedData": "planned_data",
        "ShardSplit": "shard_split",
        "open_split": "by_path",
    },
)
