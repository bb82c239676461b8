"""Pretraining methods, one LightningModule each."""

from ssmpretrain.objectives.mae import MAE
from ssmpretrain.objectives.pretraining import Pretraining, Reconstruction
from ssmpretrain.objectives.simmim import SimMIM

__all__ = ["MAE", "Pretraining", "Reconstruction", "SimMIM"]
