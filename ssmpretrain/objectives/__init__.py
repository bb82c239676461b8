"""Objectives: pretraining methods, and training with labels after them; one LightningModule each.

An objective of your own is a subclass of `Objective`, in any package; `Pretraining` is one that predicts patches,
`Supervised` one with labels. The room imports callbacks never, and evaluation, training, encoders, kernels and base.
"""

from ssmpretrain.objectives.contrastive import CLIP, MAECLIP, Contrastive, ContrastiveHead, TextTower
from ssmpretrain.objectives.masked import ARM, MAE, Pretraining, Reconstruction, SimMIM
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.objectives.supervised import Finetune, LinearProbe, Supervised

__all__ = [
    "ARM",
    "CLIP",
    "MAE",
    "MAECLIP",
    "Contrastive",
    "ContrastiveHead",
    "Finetune",
    "LinearProbe",
    "Objective",
    "Pretraining",
    "Reconstruction",
    "SimMIM",
    "Supervised",
    "TextTower",
]
