"""Order of samples: the plan of an epoch, its batches, and the loader that goes through them.

It imports datamodules.decoding, datamodules.tar and the folders below them.
"""

from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import BatchKey, EpochLoader, PlanSampler
from ssmpretrain.datamodules.order.plan import EvalPlan, Order, Stage, TrainPlan

__all__ = ["BatchKey", "EpochLoader", "EvalPlan", "Order", "PlanSampler", "PlannedBatches", "Stage", "TrainPlan"]
