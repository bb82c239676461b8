"""The same training beside an encoder without pretraining."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.optim.global_batch import GlobalBatch

_SUFFIX = "_untrained"  # of the metrics of the baseline


class UntrainedBaseline(Callback):
    """Train the objective a second time beside an encoder with fresh weights, and print both results.

    The baseline is the run that `init_from: null` would give, except that everything but the encoder is paired: the
    initial values of the head, the batches, the random numbers of each step, the settings of the optimizer and the
    learning rate of each step. Each metric of the baseline is logged under its name and `_untrained`, as
    `val/mIoU_untrained`. The training of the run itself does not change. A step takes about twice as long;
    the progress shows the baseline's half as `data_wait`.

    The checkpoints of the run hold the baseline too, so a continued run continues both.

    Args:
        seed: Decides the fresh weights of the encoder; None takes the seed of the run.

    Raises:
        UserError: At the start of a run without `model.init_from`, on several devices, with accumulation of gradients,
            or in fp16.
    """

    observes_only = True

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._twin: Any = None  # twin of the module
        self._optimizer: Any = None
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if getattr(pl_module, "init_from", None) is None:
            raise UserError(
                "UntrainedBaseline: the run begins with the weights of model.init_from, and the baseline with fresh "
                "ones; got no init_from. Set it to a pretrained run, or leave the callback out."
            )
        for holds, what in (
            (trainer.world_size == 1, f"one device; got {trainer.world_size}. Set trainer.devices to 1"),
            (trainer.accumulate_grad_batches == 1,
             f"one batch a step; got accumulate_grad_batches {trainer.accumulate_grad_batches}. Set it to 1"),
            (trainer.precision != "16-mixed", "bf16 or float32; got 16-mixed. Set trainer.precision to bf16-mixed"),
        ):  # fmt: skip
            if not holds:
                raise UserError(f"UntrainedBaseline: the baseline trains with {what}, or leave the callback out.")

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        twin = module.twin(_SUFFIX)
        vars(twin)["_modules"] = copy.deepcopy(module._modules)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if self.seed is None else self.seed)
            fresh: Any = create_encoder(module.encoder_name, num_classes=module.num_outputs, **module.encoder_args)
        twin.encoder.load_state_dict(fresh.state_dict())
        self._optimizer = twin.build_optimizer(GlobalBatch.of(trainer).size)
        if self._loaded is not None:
            twin.load_state_dict(self._loaded["model"])
            self._optimizer.load_state_dict(self._loaded["optimizer"])
            self._loaded = None
        elif trainer.global_step > 0:
            raise UserError(
                "UntrainedBaseline: a continued run continues its baseline; the checkpoint holds none. Leave the "
                "callback out, or start a new run."
            )
        self._twin = twin
        everyone: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._seeds = next(one for one in everyone if isinstance(one, ExactResume))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ours = trainer.optimizers[0].param_groups
        for group, our in zip(self._optimizer.param_groups, ours, strict=True):
            group["lr"] = our["lr"]
        self._twin.train()
        self._seeds.seed(trainer, batch_idx)
        with trainer.precision_plugin.train_step_context():
            loss = self._twin.training_step(batch, batch_idx)
        self._optimizer.zero_grad()
        loss.backward()
        if trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(self._twin.parameters(), trainer.gradient_clip_val)
        self._optimizer.step()
        self._seeds.seed(trainer, batch_idx)  # the module's own step draws the same numbers

    # Validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._twin is not None:
            self._twin.eval()
            self._twin.on_validation_epoch_start()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._twin is not None:
            with trainer.precision_plugin.val_step_context():
                self._twin.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._twin is not None:
            self._twin.on_validation_epoch_end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._twin is not None:
            rank_zero_only(print)(comparison(trainer.callback_metrics, str(pl_module.init_from)))
        self._twin = self._optimizer = None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        if self._twin is None:
            return {}
        return {"model": self._twin.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


def comparison(metrics: Any, source: str) -> str:
    """Return a table of the validation metrics that both encoders have, in per cent.

    Args:
        metrics: Values by name, as `trainer.callback_metrics`.
        source: The source of the pretrained weights.
    """
    rows = [f"{'in per cent':<16}{'untrained':>12}{'pretrained':>12}{'difference':>12}   encoder from {source}"]
    for name, value in metrics.items():
        if name.startswith("val/") and name + _SUFFIX in metrics:
            pair = [100 * float(one) for one in (metrics[name + _SUFFIX], value)]
            rows.append(f"{name.removeprefix('val/'):<16}{pair[0]:>12.1f}{pair[1]:>12.1f}{pair[1] - pair[0]:>+12.1f}")
    return "\n".join(["", *rows])
