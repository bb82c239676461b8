"""Pretraining methods and what comes after them, one LightningModule each."""

from ssmpretrain.objectives.arm import ARM
from ssmpretrain.objectives.clip import CLIP
from ssmpretrain.objectives.finetune import Finetune
from ssmpretrain.objectives.linear_probe import LinearProbe
from ssmpretrain.objectives.mae import MAE
from ssmpretrain.objectives.mae_clip import MAECLIP
from ssmpretrain.objectives.pretraining import Pretraining, Reconstruction
from ssmpretrain.objectives.simmim import SimMIM

__all__ = ["ARM", "CLIP", "MAE", "MAECLIP", "Finetune", "LinearProbe", "Pretraining", "Reconstruction", "SimMIM"]
