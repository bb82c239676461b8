"""Pretraining methods, one LightningModule each."""

from ssmpretrain.objectives.mae import MAE

__all__ = ["MAE"]
