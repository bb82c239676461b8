"""Checkpoints of a run: the times of saving, their files and folder, and exact resume.

It imports encoders.weights, training.optim and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.training.checkpoints.exact_resume import ExactResume
    from ssmpretrain.training.checkpoints.files import CheckpointFiles
    from ssmpretrain.training.checkpoints.saving import CheckpointNotSaved, Checkpoints

__all__ = ["CheckpointFiles", "CheckpointNotSaved", "Checkpoints", "ExactResume"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointFiles": "files",
        "CheckpointNotSaved": "saving",
        "Checkpoints": "saving",
        "ExactResume": "exact_resume",
    },
    former=("ssmpretrain.training.checkpoints.saving",),
)
