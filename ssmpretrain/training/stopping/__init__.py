"""Stopping a run: signals, SLURM, a time limit, batches that never arrive, numbers that are not finite,
collapsed features.

It imports training.ranks, training.checkpoints, training.optim and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.training.stopping.collapse import CollapseGuard, CollapseLimit
    from ssmpretrain.training.stopping.non_finite import NonFiniteGuard, TrainingDiverged
    from ssmpretrain.training.stopping.preemption import Preemption, watched

__all__ = ["CollapseGuard", "CollapseLimit", "NonFiniteGuard", "Preemption", "TrainingDiverged", "watched"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CollapseGuard": "collapse",
        "CollapseLimit": "collapse",
        "NonFiniteGuard": "non_finite",
        "Preemption": "preemption",
        "TrainingDiverged": "non_finite",
        "watched": "preemption",
    },
)
