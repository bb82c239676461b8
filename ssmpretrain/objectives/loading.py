"""An objective from the checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssmpretrain import objectives
from ssmpretrain.encoders.checkpoint_file import read_content
from ssmpretrain.objectives.pretraining import Pretraining
from ssmpretrain.training.optimizers import AdamW
from ssmpretrain.training.schedules import Cosine


def load_objective(path: str | Path) -> tuple[Pretraining, dict[str, Any]]:
    """Build the objective that a checkpoint was saved by and fill it, encoder and decoder.

    Args:
        path: A `checkpoints/last.ckpt` of `fit`.

    Returns:
        The objective, in evaluation mode, and the checkpoint's content.

    Raises:
        ValueError: If the file cannot be read, or is no checkpoint of a pretraining run.
    """
    content = read_content(path)
    objective = restore_objective(content)
    if objective is None:
        raise ValueError(
            f"checkpoint: {path} holds no pretraining objective, which is more than an encoder: published and exported "
            "weights have no decoder. Give a checkpoints/last.ckpt of `fit`."
        )
    return objective, content


def restore_objective(content: Any) -> Pretraining | None:
    """The objective in the content of a checkpoint, in evaluation mode; None if it holds none."""
    name = content.get("objective") if isinstance(content, dict) else None
    cls = getattr(objectives, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, Pretraining)):
        return None
    settings: dict[str, Any] = dict(content["hyper_parameters"])
    settings.pop("init_from", None)  # the checkpoint has all weights, and the file may be gone
    optimizer, schedule = AdamW(**settings.pop("optimizer")), Cosine(**settings.pop("schedule"))
    objective = cls(**settings, optimizer=optimizer, schedule=schedule)
    objective.load_state_dict(content["state_dict"])
    return objective.eval()
