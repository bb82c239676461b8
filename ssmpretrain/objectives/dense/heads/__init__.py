"""Heads of semantic segmentation: from maps of an encoder to logits. A recipe names one by its class path.

They import only training/settings.py and base.
"""

from ssmpretrain.objectives.dense.heads.fcn import FCN
from ssmpretrain.objectives.dense.heads.head import Head
from ssmpretrain.objectives.dense.heads.linear import Linear
from ssmpretrain.objectives.dense.heads.segmenter import Segmenter
from ssmpretrain.objectives.dense.heads.upernet import UPerNet

__all__ = ["FCN", "Head", "Linear", "Segmenter", "UPerNet"]
