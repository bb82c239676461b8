"""The images of one split, found and checked: those of a folder, or of shards.

It imports datamodules.order and the folders below it.
"""

from ssmpretrain.datamodules.splits.by_path import open_split
from ssmpretrain.datamodules.splits.folder_split import FolderSplit
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.shard_split import ShardSplit

__all__ = ["FolderSplit", "ImageSplit", "ShardSplit", "open_split"]
