"""Optimizers, schedules, ramps, clipping, parameter groups, and the state that an optimizer takes from a checkpoint.

It imports encoders, base, and of training only settings.py and training.ranks.sharded_tensors.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.training.optim.adamw import AdamW
    from ssmpretrain.training.optim.global_batch import GlobalBatch
    from ssmpretrain.training.optim.head_optimizer import SGD, HeadAdamW
    from ssmpretrain.training.optim.lars import LARS
    from ssmpretrain.training.optim.parameter_table import ParameterGroups
    from ssmpretrain.training.optim.ramps import Ramp
    from ssmpretrain.training.optim.schedules import Cosine, Poly, Schedule, Steps

__all__ = [
    "LARS",
    "SGD",
    "AdamW",
    "Cosine",
    "GlobalBatch",
    "HeadAdamW",
    "ParameterGroups",
    "Poly",
    "Ramp",
    "Schedule",
    "Steps",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AdamW": "adamw",
        "Cosine": "schedules",
        "GlobalBatch": "global_batch",
        "HeadAdamW": "head_optimizer",
        "LARS": "lars",
        "ParameterGroups": "parameter_table",
        "Poly": "schedules",
        "Ramp": "ramps",
        "SGD": "head_optimizer",
        "Schedule": "schedules",
        "Steps": "schedules",
    },
)
