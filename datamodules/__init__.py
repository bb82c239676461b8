"""LightningDataModules: where images come from. Loaded on first use: packing shards needs no Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmpretrain.datamodules.image_folder import ImageFolder
    from ssmpretrain.datamodules.image_shards import ImageShards
    from ssmpretrain.datamodules.image_text_shards import ImageTextShards
    from ssmpretrain.datamodules.synthetic.digits import Digits
    from ssmpretrain.datamodules.synthetic.shapes import Shapes

__all__ = ["Digits", "ImageFolder", "ImageShards", "ImageTextShards", "Shapes"]

_MODULES = {
    "Digits": "synthetic.digits",
    "ImageFolder": "image_folder",
    "ImageShards": "image_shards",
    "ImageTextShards": "image_text_shards",
    "Shapes": "synthetic.shapes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
