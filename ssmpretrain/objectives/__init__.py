"""Pretraining methods, one LightningModule each."""

from ssmpretrain.objectives.arm import ARM
from ssmpretrain.objectives.finetune import Finetune
from ssmpretrain.objectives.mae import MAE
from ssmpretrain.objectives.pretraining import Pretraining, Reconstruction
from ssmpretrain.objectives.simmim import SimMIM

__all__ = ["ARM", "MAE", "Finetune", "Pretraining", "Reconstruction", "SimMIM"]
