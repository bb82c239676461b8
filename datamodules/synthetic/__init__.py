"""Synthetic data that need no download: handwritten digits on photographs, and scenes of shapes with captions.

It imports the data modules and the folders below them.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.synthetic.digits import Digits
    from ssmpretrain.datamodules.synthetic.shapes import Shapes

__all__ = ["Digits", "Shapes"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Digits": "digits",
        "Shapes": "shapes",
    },
)
