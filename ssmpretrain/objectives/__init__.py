"""Pretraining methods and what comes after them, one LightningModule each."""

from ssmpretrain.objectives.contrastive.clip import CLIP
from ssmpretrain.objectives.contrastive.mae_clip import MAECLIP
from ssmpretrain.objectives.masked.arm import ARM
from ssmpretrain.objectives.masked.mae import MAE
from ssmpretrain.objectives.masked.pretraining import Pretraining, Reconstruction
from ssmpretrain.objectives.masked.simmim import SimMIM
from ssmpretrain.objectives.supervised.finetune import Finetune
from ssmpretrain.objectives.supervised.linear_probe import LinearProbe

__all__ = ["ARM", "CLIP", "MAE", "MAECLIP", "Finetune", "LinearProbe", "Pretraining", "Reconstruction", "SimMIM"]
