"""Objectives: pretraining methods, and training with labels; each is one LightningModule.

To add an objective, subclass `Objective` in any package. `Pretraining` is the base class of objectives that predict
patches, `Supervised` that of objectives with labels. They import evaluation, training, encoders, kernels and base, but
no callbacks.
"""

from ssmpretrain.objectives.contrastive import CLIP, MAECLIP, Contrastive, ContrastiveHead, TextTower
from ssmpretrain.objectives.dense import Dense, Detection, Segmentation
from ssmpretrain.objectives.joint_embedding import DINO, JointEmbedding, LeJEPA
from ssmpretrain.objectives.masked import ARM, MAE, Pretraining, Reconstruction, SimMIM
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.objectives.supervised import Finetune, LinearProbe, Supervised

__all__ = [
    "ARM",
    "CLIP",
    "DINO",
    "MAE",
    "MAECLIP",
    "Contrastive",
    "ContrastiveHead",
    "Dense",
    "Detection",
    "Finetune",
    "JointEmbedding",
    "LeJEPA",
    "LinearProbe",
    "Objective",
    "Pretraining",
    "Reconstruction",
    "Segmentation",
    "SimMIM",
    "Supervised",
    "TextTower",
]
