"""The base class of objectives with labels: classes, the classification head, and checks of the labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import OptimizerSettings
from ssmpretrain.training.optim.schedules import Schedule

_log = logging.getLogger(__name__)
_MOST_CLASSES = 1 << 22


def has_fresh_head(encoder: Any) -> bool:
    """Return whether the weights of an encoder's head are fresh, rather than loaded from a file."""
    report = getattr(encoder, "load_report", None)
    return report is None or any(name.endswith(".weight") for name in _head_names(encoder) & set(report.fresh))


def _head_names(encoder: Any) -> set[str]:
    head = {id(parameter) for parameter in encoder.get_classifier().parameters()}
    return {name for name, parameter in encoder.named_parameters() if id(parameter) in head}


def _names_in(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes in a checkpoint or an origin; older versions store none."""
    names = content.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


class Supervised(Objective):
    """Base class of objectives with labels, from a pretrained encoder or from scratch. Subclasses define the loss.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder; they override those that `init_from` was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. None trains from scratch.
        num_classes: Number of classes, at least 1. Labels are from 0 to num_classes - 1.
        num_outputs: Outputs of the encoder's own head, 0 for none. A head in `init_from` with this number is kept.
        optimizer: Settings of the optimizer; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.
        **settings: Other arguments of the subclass, plain data. They are saved as hyper-parameters too.

    Raises:
        ValueError: If an argument is out of range, if neither `encoder` nor `init_from` is given, or if the file does
            not fill the encoder.
    """

    def __init__(
        self,
        encoder: str | None,
        encoder_args: dict[str, Any] | None,
        init_from: str | None,
        num_classes: int,
        num_outputs: int,
        optimizer: OptimizerSettings,
        schedule: Schedule,
        **settings: Any,
    ) -> None:
        where = type(self).__name__
        if num_classes < 1:
            raise UserError(f"{where}: num_classes is at least 1; got {num_classes}.")
        if num_classes > _MOST_CLASSES:
            raise UserError(f"{where}: num_classes is at most {_MOST_CLASSES:,}; got {num_classes:,}.")
        if "num_classes" in (encoder_args or {}):
            raise UserError(f"{where}: encoder_args takes no num_classes; set model.num_classes.")
        super().__init__(
            encoder,
            encoder_args,
            optimizer,
            schedule,
            num_outputs=num_outputs,
            init_from=init_from,
            num_classes=num_classes,
            **settings,
        )
        self.num_classes = num_classes

    def evaluated_features(self, images: Tensor) -> Tensor:
        """Compute the pooled features (B, F) of images (B, 3, H, W), without a head, as `knn` does."""
        return self.pooled_vector(images)

    def configure_model(self) -> None:
        super().configure_model()
        if hasattr(self._data, "use_labels"):
            self._data.use_labels()
        self._keep_classes_of_head()
        if hasattr(self._data, "known_labels"):
            for split in ("train", "val") if self.trainer.state.fn == TrainerFn.FITTING else ("val",):
                for which, label in self._data.known_labels(split):
                    self._check_label(label, f"{which} ({split})")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        there = len(getattr(self._data, "classes", ()))  # classes of the checkpoint to continue from, if it names them
        if there and there < self.num_classes:
            rank_zero_only(_log.warning)(
                "%s: the data has %d classes, the head %d; set model.num_classes to %d",
                type(self).__name__, there, self.num_classes, there,
            )  # fmt: skip

    def _keep_classes_of_head(self) -> None:
        """Number the labels of the data as the loaded head numbers its classes, if both name their classes."""
        report: Any = getattr(self.encoder, "load_report", None)
        names = _names_in(report.origin) if report is not None and self.num_outputs else []
        own = list(getattr(self._data, "classes", ()))
        if not names or has_fresh_head(self.encoder):
            return
        if set(own) <= set(names):
            self._number_labels(names, str(report.path))
            return
        lacking = next(name for name in own if name not in names)
        rank_zero_only(_log.warning)(
            "%s: the data has the class %s, which the head of %s (%s, ...) does not know: the head begins anew",
            type(self).__name__, lacking, report.path, names[0],
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.renew_head()
        self.encoder.load_report = replace(report, fresh=(*report.fresh, *_head_names(self.encoder)))

    def _number_labels(self, names: list[str], source: str) -> None:
        if hasattr(self._data, "label_by"):
            self._data.label_by(names, source)

    def renew_head(self) -> None:
        """Replace the head of the encoder by a fresh one."""
        self.encoder.reset_classifier(self.num_classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if names := list(getattr(self._data, "classes", ())):
            checkpoint["classes"] = names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if names := _names_in(checkpoint):
            self._number_labels(names, "the run's checkpoint")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        labels = batch["label"]  # still on the CPU, where reading values costs nothing
        wrong = (labels < 0) | (labels >= self.num_classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            image = batch["key"][first] if "key" in batch else f"image {first} of a batch"
            self._check_label(int(labels[first]), image)
        return batch

    def _check_label(self, label: int, image: str) -> None:
        if not 0 <= label < self.num_classes:
            got = f"label {label}" if label >= 0 else "none"
            raise UserError(
                f"{type(self).__name__}: labels are from 0 to {self.num_classes - 1}; got {got} of {image}. "
                + (
                    "Set model.num_classes to the data's."
                    if label >= 0
                    else "Label the data, leave it out, or skip it with data.require_labels true."
                )
            )
