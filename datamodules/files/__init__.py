"""Files on local and network disks: images in folders, reads of limited size, and repeated attempts after errors.

It imports base alone.
"""

from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS, ImageFiles, find_images, read_file

__all__ = ["IMAGE_EXTENSIONS", "ImageFiles", "find_images", "read_file"]
