"""Objectives from the checkpoints of runs: find the class, build the objective, fill it with weights.

A checkpoint names its class, but restoring it imports no module of that name. A class of this package is known by its
name. A class from outside is found if its module is imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from ssmpretrain import objectives
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.encoders.weights.build import check_described
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images, images_of, remember_images
from ssmpretrain.encoders.weights.state_dict import choose_state, origin_in
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.masked.pretraining import Pretraining
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.settings import Settings, plain

T = TypeVar("T")


@dataclass(frozen=True)
class Restored(Generic[T]):
    """The objective of a run, filled with the weights of a checkpoint.

    Attributes:
        model: The objective, in evaluation mode. Its encoder knows the preparation of its images.
        path: The checkpoint.
        content: The whole content of the checkpoint.
        entry: Name of the entry that holds the weights.
    """

    model: T
    path: Path
    content: dict[str, Any]
    entry: str

    @property
    def images(self) -> dict[str, Any]:
        """Return the preparation of the images, see `images_of`."""
        model: Any = self.model
        return images_of(model.encoder)

    @property
    def origin(self) -> dict[str, Any]:
        """Return the origin of the weights, see `describe_weights`."""
        return origin_in(self.content, self.entry, self.path)


def load_objective(path: str | Path, ema: bool | None = None) -> Restored[Pretraining]:
    """Restore an objective that predicts pixels, with encoder and decoder.

    Args:
        path: Folder of a run, or a checkpoint of it.
        ema: As in `restore`.

    Raises:
        ValueError: As `restore`, and if the file is no checkpoint of such a run.
    """
    content = read_content(path := weights_in(path))
    if restored := restore(content, path, Pretraining, ema):  # type: ignore[type-abstract]
        return restored
    if isinstance(content, dict) and content.get("objective") == "CLIP":
        raise UserError(f"checkpoint: {path} is of a run of CLIP, which predicts no pixels. MAECLIP does, beside it.")
    if outside := _outside(content):
        raise UserError(
            f"checkpoint: {path} is of a run of {outside}, and no Pretraining of that name is imported. Import its "
            "module first; for a command, name the module with --trust."
        )
    raise UserError(
        f"checkpoint: {path} holds no pretraining objective with encoder and decoder; published and exported weights "
        "have no decoder. Give a checkpoints/last.ckpt of `fit`."
    )


def load_contrastive(path: str | Path, ema: bool | None = None) -> Restored[Contrastive]:
    """Restore an objective that embeds images and texts, with both towers.

    Args:
        path: Folder of a run of CLIP, or a checkpoint of it.
        ema: As in `restore`.

    Raises:
        ValueError: As `restore`, and if the file is no checkpoint of such a run.
    """
    content = read_content(path := weights_in(path))
    if restored := restore(content, path, Contrastive, ema):
        return restored
    name = _outside(content) or (content.get("objective") if isinstance(content, dict) else None)
    what = f"one of {name}" if name else "none of a run"
    raise UserError(
        f"checkpoint: images and texts have embeddings in a run of CLIP; {path} is {what}. "
        "Give the folder of a run of CLIP, or its checkpoints/last.ckpt. To teach this encoder texts: fit --config "
        f"clip_vim_b --model.encoder null --model.init_from {path}; to judge its features: knn."
    )


def restore(content: Any, path: str | Path, kind: type[T], ema: bool | None = None) -> Restored[T] | None:
    """Build the objective of a checkpoint, and fill it with the weights. Files of initial weights are not needed.

    Args:
        content: The whole content of the checkpoint, as `read_content` returns it.
        path: The checkpoint, for messages.
        kind: Class of the objective, or a base class of it.
        ema: True for the moving average of the weights, False for the weights in training, None for the weights that
            the run reports.

    Returns:
        The objective, or None if the checkpoint holds no objective of this kind.

    Raises:
        ValueError: If the checkpoint lacks these weights, if the described objective cannot be built, if the weights
            cannot fill it, or if a weight is NaN or infinite.
    """
    cls: Any = _class_in(content)
    if cls is None or not issubclass(cls, kind):
        return None
    state, entry = choose_state(content, Path(path), ema)
    check_finite("checkpoint", state, path)
    model: Any = _built(cls, content, state, path)
    model.load_state_dict(state)
    remember_images(model.encoder, checked_images(content.get("images"), path))
    return Restored(model.eval(), Path(path), content, entry)


def _class_in(content: Any) -> type[Objective] | None:
    """Return the class that a checkpoint names; None if it names no class, or a class whose module is not imported."""
    name = content.get("objective") if isinstance(content, dict) else None
    module, _, outside = (_outside(content) or "").rpartition(".")
    cls = getattr(sys.modules.get(module), outside, None) if outside else getattr(objectives, str(name), None)
    return cls if isinstance(cls, type) and issubclass(cls, Objective) else None


def _outside(content: Any) -> str | None:
    """Return the full name of the checkpoint's class if it is from another package, else None."""
    name = content.get("objective_class") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def _built(cls: type[Objective], content: dict[str, Any], state: dict[str, Any], path: str | Path) -> Objective:
    """Build the objective that a checkpoint describes, with fresh weights.

    Args:
        cls: Class of the objective.
        content: The whole content of the checkpoint. Its "hyper_parameters" are plain data.
        state: The weights that will fill the objective.
        path: The checkpoint, for messages.

    Raises:
        ValueError: If the checkpoint does not describe the objective, or the weights cannot fill it.
    """
    try:
        settings = _settings(cls, {**cls.former_settings, **content["hyper_parameters"]})
    except (KeyError, TypeError, ValueError, AttributeError, NameError) as error:
        raise UserError(
            f"checkpoint: {path} says how its {cls.__name__} was built, under hyper_parameters; got something else "
            f"({type(error).__name__}: {error}). Give a checkpoint as `fit` writes it."
        ) from error
    sizes = {name: plain(value) for name, value in settings.items() if name not in ("optimizer", "schedule")}
    build: Any = cls
    check_described(f"it is of {cls.__name__}", sizes, state, path, lambda: build(**settings))
    return build(**settings)  # type: ignore[no-any-return]


def _settings(cls: type[Objective], hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an objective, without those that name sources of weights."""
    settings = {name: value for name, value in hyper_parameters.items() if name not in cls.sources_of_weights}
    args = settings["encoder_args"]
    settings["encoder_args"] = {name: value for name, value in args.items() if name not in OTHER_WEIGHTS}
    for name, hint in get_type_hints(cls.__init__).items():
        if name in settings:
            settings[name] = _of_plain(hint, settings[name], cls.sources_of_weights)
    return settings


def _of_plain(hint: Any, value: Any, left_out: Sequence[str]) -> Any:
    """Return the dataclass that a type hint names, built from plain data, with the dataclasses in it."""
    kind: Any = next((one for one in get_args(hint) or (hint,) if is_dataclass(one)), None)  # also of `Kind | None`
    if kind is None or not isinstance(value, dict):
        return value
    values = {name: part for name, part in value.items() if name not in left_out}
    if issubclass(kind, Settings):
        return kind.of(values)
    hints = get_type_hints(kind)
    return kind(**{name: _of_plain(hints.get(name), part, left_out) for name, part in values.items()})
