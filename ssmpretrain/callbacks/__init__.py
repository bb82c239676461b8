"""Callbacks that a recipe may name. The attribute `observes_only` of each tells whether it leaves training unchanged.

They import evaluation, training, encoders and base. They import no objective, and only call its methods.
"""

from ssmpretrain.callbacks.bad_data import BadData
from ssmpretrain.callbacks.compile_encoder import CompileEncoder
from ssmpretrain.callbacks.dense_predictions import DensePredictions
from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.callbacks.loss_plot import LossPlot
from ssmpretrain.callbacks.online_evaluation import OnlineEvaluation
from ssmpretrain.callbacks.progress import PlainProgress, Throughput
from ssmpretrain.callbacks.reconstructions import Reconstructions
from ssmpretrain.callbacks.sample_log import SampleLog
from ssmpretrain.callbacks.similarity_matrix import SimilarityMatrix
from ssmpretrain.callbacks.untrained_baseline import UntrainedBaseline
from ssmpretrain.callbacks.zero_shot import ZeroShot

__all__ = [
    "EMA",
    "BadData",
    "CompileEncoder",
    "DensePredictions",
    "LossPlot",
    "OnlineEvaluation",
    "PlainProgress",
    "Reconstructions",
    "SampleLog",
    "SimilarityMatrix",
    "Throughput",
    "UntrainedBaseline",
    "ZeroShot",
]
