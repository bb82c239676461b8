"""The run that a command is about to train or validate, described by plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.global_batch import GlobalBatch


def _as_stored(config: dict[str, Any]) -> dict[str, Any]:
    return config


@dataclass(frozen=True)
class RunRequest:
    """Values of model, data and trainer that decide where a run starts.

    Attributes:
        objective: Class name of the model.
        encoder: Name of the encoder; None for a model without one.
        num_classes: Classes of the model's head; None for a model without one.
        has_settings: Whether the model keeps hyper-parameters.
        is_ours: Whether the model is an `Objective`, whose checkpoints follow more rules.
        begins_with: File of weights that training begins with; None for random weights.
        keeps_average: Whether a callback averages the weights.
        reported: Description of the reported weights, e.g. the average; None if the run has one set of weights.
        max_steps: Steps after which the trainer stops; -1 for no limit.
        max_epochs: Epochs after which the trainer stops; None or -1 for no limit.
        batch: The global batch; None if the data module has no batch size.
        data: Class name of the data module, the key of its state in a checkpoint.
        observers: Class names of callbacks that do not change the result of training.
        with_defaults: Function that completes a stored configuration with the defaults of options it lacks.
    """

    objective: str
    encoder: str | None = None
    num_classes: int | None = None
    has_settings: bool = True
    is_ours: bool = True
    begins_with: str | None = None
    keeps_average: bool = False
    reported: str | None = None
    max_steps: int = -1
    max_epochs: int | None = None
    batch: GlobalBatch | None = None
    data: str = ""
    observers: frozenset[str] = frozenset()
    with_defaults: Callable[[dict[str, Any]], dict[str, Any]] = _as_stored

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        model: LightningModule,
        data: LightningDataModule | None,
        observers: frozenset[str],
        with_defaults: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> RunRequest:
        """Read the values from model, data and trainer. The last two arguments become attributes unchanged."""
        average = _average_of(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        given = getattr(model, "encoder_args", {})
        other_weights = next((name for name in OTHER_WEIGHTS if given.get(name)), None)
        return cls(
            objective=type(model).__name__,
            encoder=getattr(model, "encoder_name", None),
            num_classes=getattr(model, "num_classes", None),
            has_settings=bool(model.hparams),
            is_ours=isinstance(model, Objective),
            begins_with=getattr(model, "init_from", None) or other_weights,
            keeps_average=average is not None or any(isinstance(one, WeightAveraging) for one in callbacks),
            reported=getattr(model, "reported", None) if average is None else average.describe_reported(),
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
            batch=_batch(trainer, data),
            data=type(data).__qualname__,
            observers=observers,
            with_defaults=with_defaults,
        )


def _average_of(trainer: Trainer) -> EMA | None:
    """Return the callback that averages the weights, if there is one."""
    return next((one for one in trainer.callbacks if isinstance(one, EMA)), None)  # type: ignore[attr-defined]


def _batch(trainer: Trainer, data: LightningDataModule | None) -> GlobalBatch | None:
    try:
        return GlobalBatch.of(trainer, data)
    except ValueError:  # a data module of another package, without a batch size
        return None
