"""Masked and autoregressive image modelling: MAE, SimMIM, ARM, and the patches that they hide.

It imports encoders, training, evaluation and base, and of objectives only objective.py.
"""

from ssmpretrain.objectives.masked.arm import ARM
from ssmpretrain.objectives.masked.mae import MAE
from ssmpretrain.objectives.masked.pretraining import Pretraining, Reconstruction
from ssmpretrain.objectives.masked.simmim import SimMIM

__all__ = ["ARM", "MAE", "Pretraining", "Reconstruction", "SimMIM"]
