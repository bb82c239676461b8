"""Labels: lists of classes, captions, and numbers that mean the same in every source.

It imports datamodules.files, datamodules.faults and base.
"""

from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, UNLABELLED, Classes, Labels
from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets

__all__ = ["CLASSES_FILE", "UNLABELLED", "Captions", "Classes", "LabelledSets", "Labels"]
