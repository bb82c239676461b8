"""What a recipe can hang onto a run."""

from ssmpretrain.callbacks.loss_plot import LossPlot
from ssmpretrain.callbacks.online_evaluation import OnlineEvaluation
from ssmpretrain.callbacks.progress import PlainProgress, Throughput
from ssmpretrain.callbacks.reconstructions import Reconstructions

__all__ = ["LossPlot", "OnlineEvaluation", "PlainProgress", "Reconstructions", "Throughput"]
