"""Zero-shot classification during validation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import validate_now
from ssmpretrain.evaluation.zero_shot_accuracy import ZeroShotAccuracy, check_labels, number_by_names
from ssmpretrain.training.stopping.preemption import watched

_log = logging.getLogger(__name__)
_TRIED = 64  # images of `data` whose labels are checked before training
_ROWS = {
    "val/zeroshot_top1": "zero-shot top-1, all classes",
    "val/zeroshot_held_out": "zero-shot top-1, held-out classes",
    "val/i2t_r1": "R@1, image to text",
    "val/t2i_r1": "R@1, text to image",
}


class ZeroShot(Callback):
    """Evaluate a contrastive run by zero-shot classification of the labelled validation images, exactly over ranks.

    Each class name is put into the templates and embedded. An image belongs to the class with the nearest embedding. At
    the end of `fit` a table compares accuracies and retrieval with chance. `python -m ssmpretrain zeroshot RUN`
    computes the same numbers for the last checkpoint of a run; add `--no-ema` if the run averages its weights.

    Args:
        classes: Names of the classes, in the order of the labels: "imagenet", words with commas between them, a file
            with one name per line, a JSON file (a list, or {label: name}), or a list. None takes `classes` of the data
            module.
        templates: Sentences with {} for the name: "openai" (80), "simple" (7), one sentence, a file or a list. None
            takes `templates` of the data module, or "openai" if it has none.
        data: Other labelled images instead of the run's validation images: an image folder with a sub-folder per class,
            or shards. They are prepared like the images of the run.
        every_n_epochs: Evaluate at the validation of every n-th epoch and of the last epoch; at least 1.
        untrained: Whether to validate once before the first step, so that the log begins with the untrained model.

    Logs:
        val/zeroshot_top1, val/zeroshot_top5: Accuracy in [0, 1]; with fewer than six classes the second is 1.
        val/zeroshot_held_out: Top-1 accuracy, among all classes, on images of the classes in `held_out` of the data
            module.

    Raises:
        ValueError: If an argument is out of range; when training begins, if names or templates are missing, or the
            objective has no text tower.

    Source: Radford et al., "CLIP" (arXiv:2103.00020), section 3.1.
    """

    observes_only = True

    def __init__(
        self,
        classes: str | list[str] | None = None,
        templates: str | list[str] | None = None,
        data: str | list[str] | None = None,
        every_n_epochs: int = 1,
        untrained: bool = False,
    ) -> None:
        if every_n_epochs < 1:
            raise UserError(f"ZeroShot: every_n_epochs is at least 1; got {every_n_epochs}. Give a larger one.")
        if data is not None and classes is None:
            raise UserError(
                "ZeroShot: images of its own need the names of their classes; got data without classes. Give classes."
            )
        self.classes, self.templates, self.data = classes, templates, data
        self.every_n_epochs, self.untrained = every_n_epochs, untrained
        self._before: dict[str, float] = {}  # results of the untrained model
        self._now: dict[str, float] = {}
        self._accuracy: ZeroShotAccuracy | None = None  # of the validation under way
        self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module
        if not hasattr(model, "zero_shot"):
            raise UserError(
                f"ZeroShot: classes are named to a text tower; {type(model).__name__} has none. Use CLIP, or "
                "OnlineEvaluation for objectives of images alone."
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own = data if self.data is None else None  # the run's data, which may name its classes
        names = self.classes or getattr(own, "classes", None)
        if not names:
            raise UserError(
                f"ZeroShot: every label has a name; {type(data).__name__} names none. Set classes of the callback."
            )
        sentences = self.templates or getattr(own, "templates", None) or "openai"
        self._classes = model.zero_shot(names, sentences, where="ZeroShot")
        self._held_out = list(getattr(own, "held_out", []))
        if own is not None and self.classes and not self._held_out:
            number_by_names(own, self._classes.names, where="ZeroShot")
        if own is not None and hasattr(own, "known_labels"):
            known = [label for _, label in own.known_labels("val")]
            check_labels(torch.tensor(known), len(self._classes.names), where="ZeroShot")
        if self.data is not None:
            self._others = data.others(self.data)
            self._others.setup("validate")
            number_by_names(self._others, self._classes.names, where="ZeroShot")
            self._others.use_labels()
            for batch in self._others.val_dataloader(limit=_TRIED):
                check_labels(batch["label"], len(self._classes.names), where="ZeroShot")

    # Hooks of Lightning

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.untrained and trainer.global_step == 0:
            validate_now(trainer)
            self._before, self._now = self._now, {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._accuracy = None
        if not self._is_due(trainer):
            return
        with trainer.precision_plugin.forward_context():
            classes = self._classes.embeddings()
        self._accuracy = ZeroShotAccuracy(classes, self._held_out, where="ZeroShot")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.sanity_checking and self.data is None:
            check_labels(batch["label"], len(self._classes.names), where="ZeroShot")
        if self._accuracy is not None and self.data is None:
            self._accuracy.add(outputs["image"], batch["label"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._accuracy is None:
            return
        if self.data is not None:
            self._classify_others(trainer, pl_module, self._accuracy)
        found = self._accuracy.result(lambda part: trainer.strategy.reduce(part, reduce_op="sum"))
        if found.pop("images", 0) == 0 and not self._told:
            self._told = True
            rank_zero_only(_log.warning)("ZeroShot: no validation image has a label; there is no accuracy.")
        for name, value in found.items():
            pl_module.log(f"val/zeroshot_{name}", value, prog_bar=name == "top1")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._now |= {
                name: float(trainer.callback_metrics[name]) for name in _ROWS if name in trainer.callback_metrics
            }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images = getattr(pl_module, "num_retrieved", 0)
        chance = {name: 1 / (len(self._classes.names) if "zeroshot" in name else max(1, images)) for name in _ROWS}
        if self._now and trainer.is_global_zero:
            begun = "untrained" if getattr(pl_module, "init_from", None) is None else "at the start"
            print(table({"chance": chance, begun: self._before, "trained": self._now}))

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = dict(state_dict["untrained"])

    # How

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        chosen = last or trainer.global_step == 0 or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return chosen or trainer.state.fn != TrainerFn.FITTING

    def _classify_others(self, trainer: Trainer, pl_module: LightningModule, accuracy: ZeroShotAccuracy) -> None:
        model: Any = pl_module
        for batch in watched(trainer, self._others.val_dataloader()):
            with trainer.precision_plugin.forward_context():
                image = model.encode_image(batch["image"].to(model.device))
            accuracy.add(image, batch["label"].to(model.device))


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Format a table of accuracies and recall in per cent, with one column per stage; the last column is complete."""
    columns = {title: values for title, values in columns.items() if values}
    *_, trained = columns.values()
    lines = ["", f"{'':<34}" + "".join(f"{title:>14}" for title in columns)]
    for name, what in _ROWS.items():
        if name in trained:
            cells = (f"{100 * values[name]:.1f} %" if name in values else "" for values in columns.values())
            lines.append(f"{what:<34}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
