"""An exponential moving average of the weights."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.ranks.sharded_tensors import local

_log = logging.getLogger(__name__)
_SUFFIX = "_ema"  # of the metrics of the average
_NAMES = {"ema": "their average", "raw": "the weights in training"}


class EMA(Callback):
    """Average the weights over the steps: average <- decay * average + (1 - decay) * weights after each step.

    The average starts from the weights that training starts with. Each validation evaluates both sets of weights: the
    objective logs `val/top1` for the weights in training and `val/top1_ema` for the average, likewise all its other
    metrics. Other callbacks evaluate the weights in training. A checkpoint holds both sets; a continued run restores
    both exactly.

    The run reports one of the two sets: `fit` leaves it in the module, a checkpoint holds it as "state_dict", and
    `load_encoder`, `init_from` and `export` take it by default. Let other callbacks monitor the metrics of this set.

    Args:
        decay: Weight of the old average in each step, in [0, 1). The average lags 1 / (1 - decay) steps behind the
            weights: take less than 0.9999 for runs of a few thousand steps.
        report: "ema" for the average, or "raw" for the weights in training. Take "raw" to compare with published
            numbers of raw weights, or for a run so short that the average lags behind.

    Raises:
        ValueError: If an argument is out of range, or if the objective averages its weights itself, as a teacher.
    """

    # Entries of a checkpoint. With report "ema" they have the names of Lightning's EMAWeightAveraging: "state_dict" is
    # the average, "current_model_state" the weights in training. With report "raw", "state_dict" is the weights in
    # training and "model_ema" the average, as in published files. Lightning's callback itself is not used: it keeps the
    # average of a GPU run on the CPU, so that every step waits for a copy of all weights.

    def __init__(self, decay: float = 0.9999, report: Literal["ema", "raw"] = "ema") -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay is in [0, 1); got {decay}.")
        if report not in _NAMES:
            raise UserError(f"EMA: report is ema or raw; got {report!r}.")
        self.decay, self.report = decay, report
        self._reset()

    def _reset(self) -> None:
        self._other: dict[str, Tensor] = {}  # the average; the weights in training while the module holds the average
        self._swapped = False
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0
        self._twin: Any = None  # twin of the module, which validates the average
        self._whole: dict[str, Tensor] = {}  # tensors of the twin

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()
        if getattr(pl_module, "reported", None) is not None:
            raise UserError(
                f"EMA: {type(pl_module).__name__} averages its weights itself, as its teacher. Leave EMA out."
            )
        if stage == "fit":
            self._compare_monitors(trainer)
            if not hasattr(pl_module, "twin"):
                rank_zero_only(_log.warning)(
                    "EMA: %s is validated with the weights in training alone; the average of an Objective is too",
                    type(pl_module).__name__,
                )

    # The average

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)
        self._step = trainer.global_step
        lag, steps = 1 / (1 - self.decay), trainer.estimated_stepping_batches
        if lag > steps:
            rank_zero_only(_log.warning)(
                "EMA: the average lags %.0f steps behind the weights, longer than the run of %.0f steps; "
                "set a lower decay than %g", lag, steps, self.decay,
            )  # fmt: skip

    def _begin(self, pl_module: LightningModule) -> None:
        """Start the average from the one in the checkpoint, or else from the weights."""
        start, self._loaded = self._loaded, None
        weights = _weights(pl_module)
        self._other = {name: (start or weights)[name].to(value, copy=True) for name, value in weights.items()}
        self._swapped = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        weights = _weights(pl_module)
        averages, values = ([local(state[name]) for name in self._other] for state in (self._other, weights))
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(pl_module, average=self.report == "ema")  # not sooner: a checkpoint may be saved until here

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and self._loaded is not None:
            self._begin(pl_module)
        self._hold(pl_module, average=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._other or not hasattr(pl_module, "twin"):  # before training, or an objective of another package
            return
        module: Any = pl_module
        self._twin = _ValidationStep(module.twin(_SUFFIX))
        self._whole = {f"module.{name}": _whole(value) for name, value in self._other.items()}
        self._twin.module.on_validation_epoch_start()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._twin is not None:
            with trainer.precision_plugin.val_step_context():
                functional_call(self._twin, self._whole, (batch, batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._twin is not None:
            self._twin.module.on_validation_epoch_end()
            self._twin, self._whole = None, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._hold(pl_module, average=self.report == "ema")

    def describe_reported(self) -> str:
        """Describe the set of weights that the run reports, and the option by which commands take the other set."""
        shown = "val/NAME" + (_SUFFIX if self.report == "ema" else "")
        flag = "--no-ema" if self.report == "ema" else "--ema"
        other = _NAMES["raw" if self.report == "ema" else "ema"]
        reported = "the average of the weights" if self.report == "ema" else _NAMES["raw"]
        return f"{shown}, {reported}; load_encoder, init_from and export take these, with {flag} {other}"

    def _compare_monitors(self, trainer: Trainer) -> None:
        """Warn if a callback monitors a metric of the weights that the run does not report."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = str(getattr(callback, "monitor", None) or "")
            if monitor.startswith("val/") and monitor.endswith(_SUFFIX) != (self.report == "ema"):
                rank_zero_only(_log.warning)(
                    "EMA: %s monitors %s, and the run reports %s, whose metrics %s in %s",
                    type(callback).__name__, monitor, _NAMES[self.report],
                    "end" if self.report == "ema" else "do not end", _SUFFIX,
                )  # fmt: skip

    # Checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._other:
            return
        held = checkpoint["state_dict"]
        other = {**held, **self._other}
        average, trained = (held, other) if self._swapped else (other, held)
        if self.report == "ema":
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, trained
        else:
            checkpoint["state_dict"], checkpoint["model_ema"] = trained, average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn not in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            return
        if "current_model_state" in checkpoint:
            self._loaded = checkpoint["state_dict"]
            pl_module.load_state_dict(checkpoint["current_model_state"])
        elif "model_ema" in checkpoint:
            self._loaded = checkpoint["model_ema"]
        elif trainer.state.fn == TrainerFn.FITTING:
            rank_zero_only(_log.warning)("EMA: the checkpoint holds no average; it starts from the weights there")

    def _hold(self, pl_module: LightningModule, average: bool) -> None:
        """Put the average, or the weights in training, into the module."""
        if not self._other or self._swapped == average:
            return
        weights = _weights(pl_module)
        for name, other in self._other.items():
            held = weights[name].clone()
            weights[name].copy_(other)
            other.copy_(held)
        self._swapped = average


class _ValidationStep(nn.Module):
    """Module whose `forward` is the validation step of another module, so that `functional_call` can run it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self.module
        return module.validation_step(batch, batch_idx)


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """Return the averaged tensors by name: parameters, and floating-point buffers such as running statistics."""
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
