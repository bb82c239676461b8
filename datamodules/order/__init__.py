"""Order of samples: the plan of an epoch, the batches of the plan, and the loader that yields them.

It imports datamodules.decoding, labels, tar, faults, and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.order.batches import PlannedBatches
    from ssmpretrain.datamodules.order.loader import BatchKey, EpochLoader, PlanSampler
    from ssmpretrain.datamodules.order.plan import EvalPlan, Order, Stage, TrainPlan
    from ssmpretrain.datamodules.order.trial import try_some

__all__ = [
    "BatchKey",
    "EpochLoader",
    "EvalPlan",
    "Order",
    "PlanSampler",
    "PlannedBatches",
    "Stage",
    "TrainPlan",
    "try_some",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchKey": "loader",
        "EpochLoader": "loader",
        "EvalPlan": "plan",
        "Order": "plan",
        "PlanSampler": "loader",
        "PlannedBatches": "batches",
        "Stage": "plan",
        "TrainPlan": "plan",
        "try_some": "trial",
    },
)
