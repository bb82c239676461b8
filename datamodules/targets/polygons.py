"""Masks from polygons, by the rasterisation of COCO's own tools."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.targets.run_lengths import Rle


def encode_polygons(polygons: Sequence[Sequence[float]], h: int, w: int) -> Rle:
    """Return the code of the mask that one or more polygons cover together.

    A pixel belongs to a polygon by the rule of pycocotools, with which the published masks are drawn.

    Args:
        polygons: Corners x, y, x, y, ... of each polygon in pixels, at least three corners.
        h, w: Height and width of the mask in pixels.

    Raises:
        DataError: If pycocotools is not installed.
    """
    tools = coco_masks("polygons")
    merged = tools.merge(tools.frPyObjects([list(map(float, each)) for each in polygons], h, w))
    return {"size": [h, w], "counts": merged["counts"].decode()}


def coco_masks(where: str) -> Any:
    """Return the module of pycocotools that draws polygons, which is an optional dependency.

    Args:
        where: What needs it; it opens the message.

    Raises:
        DataError: If it cannot be imported.
    """
    try:
        return import_module("pycocotools.mask")
    except ImportError as error:
        raise DataError(
            f"{where}: masks are drawn from polygons by pycocotools, which cannot be imported ({error}). Run "
            "`pip install ssmpretrain[detection]` or `pip install pycocotools`; or set masks: false to train on boxes "
            "alone."
        ) from None
