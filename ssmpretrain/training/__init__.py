"""Training: optimizers and schedules, checkpoints and exact resume, ranks, stopping.

It may import encoders, kernels and base. Objectives, callbacks and run build on it.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.training.checkpoints.exact_resume import ExactResume
    from ssmpretrain.training.checkpoints.files import CheckpointFiles
    from ssmpretrain.training.checkpoints.saving import CheckpointNotSaved, Checkpoints
    from ssmpretrain.training.optim.adamw import AdamW
    from ssmpretrain.training.optim.global_batch import GlobalBatch
    from ssmpretrain.training.optim.head_optimizer import SGD, HeadAdamW
    from ssmpretrain.training.optim.lars import LARS
    from ssmpretrain.training.optim.parameter_table import ParameterGroups
    from ssmpretrain.training.optim.ramps import Ramp
    from ssmpretrain.training.optim.schedules import Cosine, Poly, Schedule, Steps
    from ssmpretrain.training.ranks.agreement import RankAgreement, RanksDisagree
    from ssmpretrain.training.ranks.fsdp import FSDP2
    from ssmpretrain.training.ranks.reductions import RankReductions
    from ssmpretrain.training.ranks.roll_call import LostRanks, RankLost
    from ssmpretrain.training.stopping.collapse import CollapseGuard, CollapseLimit
    from ssmpretrain.training.stopping.non_finite import NonFiniteGuard, TrainingDiverged
    from ssmpretrain.training.stopping.preemption import Preemption, watched

__all__ = [
    "FSDP2",
    "LARS",
    "SGD",
    "AdamW",
    "CheckpointFiles",
    "CheckpointNotSaved",
    "Checkpoints",
    "CollapseGuard",
    "CollapseLimit",
    "Cosine",
    "ExactResume",
    "GlobalBatch",
    "HeadAdamW",
    "LostRanks",
    "NonFiniteGuard",
    "ParameterGroups",
    "Poly",
    "Preemption",
    "Ramp",
    "RankAgreement",
    "RankLost",
    "RankReductions",
    "RanksDisagree",
    "Schedule",
    "Steps",
    "TrainingDiverged",
    "watched",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AdamW": "optim.adamw",
        "CheckpointFiles": "checkpoints.files",
        "CheckpointNotSaved": "checkpoints.saving",
        "Checkpoints": "checkpoints.saving",
        "CollapseGuard": "stopping.collapse",
        "CollapseLimit": "stopping.collapse",
        "Cosine": "optim.schedules",
        "ExactResume": "checkpoints.exact_resume",
        "FSDP2": "ranks.fsdp",
        "GlobalBatch": "optim.global_batch",
        "HeadAdamW": "optim.head_optimizer",
        "LARS": "optim.lars",
        "LostRanks": "ranks.roll_call",
        "NonFiniteGuard": "stopping.non_finite",
        "ParameterGroups": "optim.parameter_table",
        "Poly": "optim.schedules",
        "Preemption": "stopping.preemption",
        "Ramp": "optim.ramps",
        "RankAgreement": "ranks.agreement",
        "RankLost": "ranks.roll_call",
        "RankReductions": "ranks.reductions",
        "RanksDisagree": "ranks.agreement",
        "SGD": "optim.head_optimizer",
        "Schedule": "optim.schedules",
        "Steps": "optim.schedules",
        "TrainingDiverged": "stopping.non_finite",
        "watched": "stopping.preemption",
    },
)
