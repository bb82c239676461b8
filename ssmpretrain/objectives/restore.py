"""An objective from the checkpoint of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ssmpretrain import objectives
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.encoders.weights.build import check_described
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.state_dict import choose_state
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.objectives.masked.pretraining import Pretraining
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

T = TypeVar("T", bound=Objective)


def load_objective(path: str | Path) -> tuple[Pretraining, dict[str, Any]]:
    """Build the objective that a checkpoint was saved by and fill it, encoder and decoder.

    Args:
        path: A `checkpoints/last.ckpt` of `fit`.

    Returns:
        The objective, in evaluation mode, and the checkpoint's content.

    Raises:
        ValueError: If the file cannot be read, is no checkpoint of a pretraining run, or a weight is NaN or infinite.
    """
    content = read_content(path)
    objective = restore_objective(content, path)
    if objective is None and isinstance(content, dict) and content.get("objective") == "CLIP":
        raise ValueError(f"checkpoint: {path} is of a run of CLIP, which predicts no pixels. MAECLIP does, beside it.")
    if objective is None:
        raise ValueError(
            f"checkpoint: {path} holds no pretraining objective, which is more than an encoder: published and exported "
            "weights have no decoder. Give a checkpoints/last.ckpt of `fit`."
        )
    return objective, content


def restore_objective(content: Any, path: str | Path) -> Pretraining | None:
    """The objective in the content of the checkpoint at `path`, in evaluation mode; None if it holds none.

    Raises:
        ValueError: If the checkpoint cannot be what it says, or a weight is NaN or infinite.
    """
    cls = class_in(content, Pretraining)  # type: ignore[type-abstract]
    if cls is None:
        return None
    state, _ = choose_state(content, Path(path), None)
    objective = built(cls, content, state, path)
    check_finite("checkpoint", state, path)
    objective.load_state_dict(state)
    return objective.eval()


def class_in(content: Any, kind: type[T]) -> type[T] | None:
    """The class of the objective that the content of a checkpoint is of; None if it is of none of this kind."""
    name = content.get("objective") if isinstance(content, dict) else None
    cls = getattr(objectives, name, None) if isinstance(name, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, kind) else None


def built(cls: type[T], content: dict[str, Any], state: dict[str, Any], path: str | Path) -> T:
    """An objective with fresh weights as a checkpoint describes it; what the run began with need not be there.

    Args:
        cls: Its class.
        content: What the checkpoint holds; its "hyper_parameters" are plain data.
        state: The weights that will fill it.
        path: The checkpoint, for messages.

    Raises:
        ValueError: If the checkpoint does not describe it, or describes one that its weights cannot fill.
    """
    try:
        settings = _settings({**cls.former_settings, **content["hyper_parameters"]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"checkpoint: {path} says how its {cls.__name__} was built, under hyper_parameters; got something else "
            f"({type(error).__name__}: {error}). Give a checkpoint as `fit` writes it."
        ) from error
    sizes = {name: value for name, value in settings.items() if name not in ("optimizer", "schedule")}
    if isinstance(text := sizes.get("text"), TextTower):
        sizes["text"] = asdict(text)
    check_described(f"it is of {cls.__name__}", sizes, state, path, lambda: cls(**settings))
    return cls(**settings)


def _settings(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an objective."""
    settings: dict[str, Any] = dict(hyper_parameters)
    args = settings["encoder_args"]
    settings["encoder_args"] = {name: value for name, value in args.items() if name not in OTHER_WEIGHTS}
    settings["optimizer"], settings["schedule"] = AdamW(**settings["optimizer"]), Cosine(**settings["schedule"])
    if "text" in settings:
        settings["text"] = TextTower(**{**settings["text"], "init_from": None})
    if "init_from" in settings:
        settings["init_from"] = None
    settings.pop("init_both_towers", None)
    return settings
