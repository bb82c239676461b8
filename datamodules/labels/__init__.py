"""Labels: lists of classes, captions, and numbers that mean the same in every source.

It imports datamodules.files, faults, and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.labels.captions import Captions
    from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, UNLABELLED, Classes, Labels
    from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets

__all__ = ["CLASSES_FILE", "UNLABELLED", "Captions", "Classes", "LabelledSets", "Labels"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CLASSES_FILE": "classes",
        "Captions": "captions",
        "Classes": "classes",
        "LabelledSets": "labelled_sets",
        "Labels": "classes",
        "UNLABELLED": "classes",
    },
)
