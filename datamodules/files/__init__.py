"""Files on local and network disks: images in folders, files read within bounds.

It imports datamodules.remote.server, for the patience that it shares with servers, and base.
"""

from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS, ImageFiles, find_images, read_file

__all__ = ["IMAGE_EXTENSIONS", "ImageFiles", "find_images", "read_file"]
