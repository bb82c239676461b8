"""An exponential moving average of the weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.training.sharded_tensors import local

_log = logging.getLogger(__name__)


class EMA(Callback):
    """Average the weights over the steps: average <- decay * average + (1 - decay) * weights after each.

    The average starts as the weights that training starts with. Validation is of the average, and so is what `fit`
    leaves in the module, what `validate` reads from a checkpoint, and what `load_encoder` and `export` take from a run
    unless asked for the weights in training. A checkpoint holds both, the average as "state_dict" and the weights in
    training as "current_model_state", and a run continued from it goes on with both exactly.

    Args:
        decay: In [0, 1). The average lags 1 / (1 - decay) steps behind the weights: take less than 0.9999 for runs of
            a few thousand steps.

    Raises:
        ValueError: If decay is out of range.
    """

    # The names in a checkpoint are those of Lightning's EMAWeightAveraging, which keeps the average of a GPU run on the
    # CPU, as it makes it before the module is moved, so that every step waits for a copy of all weights.

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is in [0, 1); got {decay}.")
        self.decay = decay
        self._other: dict[str, Tensor] = {}  # the average; while the module holds that, the weights in training
        self._swapped = False
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._other, self._swapped, self._loaded = {}, False, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start, self._loaded = self._loaded, None
        weights = _weights(pl_module)
        self._other = {name: (start or weights)[name].to(value, copy=True) for name, value in weights.items()}
        self._step, self._swapped = trainer.global_step, False
        lag, steps = 1 / (1 - self.decay), trainer.estimated_stepping_batches
        if lag > steps:
            rank_zero_only(_log.warning)(
                "EMA: the average lags %.0f steps behind the weights, longer than the run of %.0f steps; "
                "set a lower decay than %g", lag, steps, self.decay,
            )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        weights = _weights(pl_module)
        averages, values = ([local(state[name]) for name in self._other] for state in (self._other, weights))
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._other:  # not before training
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # stopped while validating
            self._swap(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)  # not sooner: until here a checkpoint may be saved

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._other:
            return
        held = checkpoint["state_dict"]
        other = {**held, **self._other}
        average, trained = (held, other) if self._swapped else (other, held)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, trained

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" in checkpoint:
            self._loaded = checkpoint["state_dict"]
            pl_module.load_state_dict(checkpoint["current_model_state"])
        else:
            rank_zero_only(_log.warning)("EMA: the checkpoint holds no average; it starts from the weights there")

    def _swap(self, pl_module: LightningModule) -> None:
        weights = _weights(pl_module)
        for name, other in self._other.items():
            held = weights[name].clone()
            weights[name].copy_(other)
            other.copy_(held)
        self._swapped = not self._swapped


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """What is averaged, by name: parameters, and buffers that hold fractions, such as running statistics."""
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
