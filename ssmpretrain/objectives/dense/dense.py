"""The base class of dense objectives: a tapped encoder, classes, layer decay, a frozen encoder."""

from __future__ import annotations

import logging
from abc import abstractmethod
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from typing_extensions import Self

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import takes_results
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.base.wording import few
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Schedule

_log = logging.getLogger(__name__)


class Dense(Objective):
    """Base class of objectives with labels for pixels or objects. Subclasses define parts, loss and metrics.

    A subclass builds its modules in `build_parts`, which begins with `tap`; the settings that it reads are set before
    `Dense.__init__` is called. The encoder is registered as `encoder`
    alone, so `load_encoder` reads it from a checkpoint of the run.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, such as `drop_path_rate`; they override those that `init_from`
            was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads. None begins with fresh weights,
            and biases of the first convolution that are all 0 are drawn as torch draws them (MambaOut, ConvNeXt), as
            padded pixels are 0. Everything else begins with fresh weights, also if the source is a dense run.
        num_classes: Number of classes, without a background, at least 1. It is the number of the data's classes.
        taps: Maps of the encoder that are read, see `Taps`.
        layer_decay: Factor on the learning rate from one layer of the encoder to the one below it, in (0, 1]. All
            modules beside the encoder, and the norms of the taps, have the full rate.
        freeze_encoder: Whether the encoder stays as it is: in evaluation mode, without gradients and optimizer state.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate, any kind of `Schedule`.
        **settings: Other arguments of the subclass by name: plain data, or data classes of plain data.

    Raises:
        UserError: If an argument is out of range or has no effect, if neither `encoder` nor `init_from` is given, or if
            the file does not fill the encoder.
    """

    optimizer_settings: AdamW
    _report: dict[str, Any] | None = None  # of the newest validation
    exported: ClassVar[tuple[str, str]] = ("forward", "logits")  # method of an exported graph, and name of its output

    def __init__(
        self,
        encoder: str | None,
        encoder_args: dict[str, Any] | None,
        init_from: str | None,
        num_classes: int,
        taps: Taps,
        layer_decay: float,
        freeze_encoder: bool,
        optimizer: AdamW,
        schedule: Schedule,
        **settings: Any,
    ) -> None:
        where = type(self).__name__
        if num_classes < 1:
            raise UserError(f"{where}: num_classes is at least 1; got {num_classes}. Set it to the data's.")
        if not 0 < layer_decay <= 1:
            raise UserError(f"{where}: layer_decay is a factor in (0, 1]; got {layer_decay}. 1 turns it off.")
        if freeze_encoder and layer_decay < 1:
            raise UserError(
                f"{where}: layer_decay changes the learning rates of the encoder, which freeze_encoder keeps; got "
                f"layer_decay {layer_decay}. Set model.layer_decay to 1, or model.freeze_encoder to false."
            )
        super().__init__(
            encoder,
            encoder_args,
            optimizer,
            schedule,
            init_from=init_from,
            num_classes=num_classes,
            taps=taps,
            layer_decay=layer_decay,
            freeze_encoder=freeze_encoder,
            **settings,
        )
        self.num_classes, self.taps = num_classes, taps
        self.layer_decay, self.freeze_encoder = layer_decay, freeze_encoder
        self.build_parts()

    @abstractmethod
    def build_parts(self) -> None:
        """Build all modules beside the encoder. Called again, with the same seed, if the encoder is built again."""

    @abstractmethod
    def check_kind(self, batch: dict[str, Any]) -> None:
        """Raise a `DataError` if a batch is not of this task, and name data modules that are."""

    def tap(self) -> TappedEncoder:
        """Return the encoder with its taps, for an attribute of this objective.

        The attribute registers the norms of the taps. The encoder is registered once, as `encoder`.
        """
        return TappedEncoder(self.encoder, self.taps, registers_encoder=False)

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        if self.init_from is None:
            _draw_zero_biases(encoder)
        return encoder.requires_grad_(False).eval() if self.hparams["freeze_encoder"] else encoder

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def build_optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        return self.optimizer_settings.build(self, global_batch, self.layer_decay)

    def _fit_encoder_to(self, size: tuple[int, int]) -> None:
        before = self.encoder
        size = family_of(before).tap_size(before, size)  # the taps pad images as far
        if tuple(before.patch_embed.img_size) != size:
            super()._fit_encoder_to(size)
        if self.encoder is not before:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.initial_seed())
                self.build_parts()

    def keep_report(self, report: dict[str, Any], path: Path) -> None:
        """Keep the report of a validation, and write it to a file of the run if the run takes results."""
        self._report = report
        if self.trainer.is_global_zero and takes_results(self.trainer):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(path.with_stem(path.stem + self.suffix), report)

    @abstractmethod
    def describe_report(self, report: dict[str, Any]) -> str:
        """Return the table that `validate` prints of a report."""

    # Hooks of Lightning

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING and self._report is not None:
            rank_zero_only(print)(self.describe_report(self._report))

    def configure_model(self) -> None:
        super().configure_model()
        self._check_classes_of_data()
        self._tell_fresh_parts()
        if self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            for name, part in self.named_children():
                if name != "encoder":
                    setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))  # type: ignore[no-untyped-call]

    @property
    def classes(self) -> list[str]:
        """Names of the data's classes; empty without data, or if the data have no names."""
        return list(getattr(self._data, "classes", None) or ())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.freeze_encoder and self.init_from is None and not self.trainer.ckpt_path:
            rank_zero_only(_log.warning)(
                "%s: freeze_encoder keeps an encoder with random weights; set model.init_from for pretrained ones",
                type(self).__name__,
            )

    def _check_classes_of_data(self) -> None:
        names = self.classes
        number = len(names) or getattr(self._data, "num_classes", None) or self.num_classes
        if number != self.num_classes:
            self._check_kind_of_data()
            named = f" ({few(names)})" if names else ""
            raise UserError(
                f"{type(self).__name__}: num_classes is the number of the data's classes; got {self.num_classes} and "
                f"{number} classes{named}. Set model.num_classes to {number}."
            )

    def _check_kind_of_data(self) -> None:
        """Raise if the data are of another task; their number of classes means nothing then."""
        fits = self.trainer.state.fn == TrainerFn.FITTING
        batch = next(iter(self._data.train_dataloader() if fits else self._data.val_dataloader()), None)
        if isinstance(batch, dict):
            self.check_kind(batch)

    def _tell_fresh_parts(self) -> None:
        """Log that only the encoder comes from `init_from`, if that is a dense run too."""
        origin = getattr(getattr(self.encoder, "load_report", None), "origin", {})
        if (theirs := origin.get("objective")) == type(self).__name__:
            rank_zero_only(_log.info)(
                "%s: the encoder is that of %s, a run of %s; all other parts begin with fresh weights",
                type(self).__name__, self.init_from, theirs,
            )  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.classes:
            checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_parts(checkpoint)
        theirs: Any = checkpoint.get("classes")
        if not (isinstance(theirs, list) and theirs and self.classes) or theirs == self.classes:
            return
        pairs = zip_longest(theirs, self.classes)
        number, (then, now) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"{type(self).__name__}: class {number} is {then!r} in the checkpoint, which numbers the outputs, and "
            f"{now!r} in the data. Give data with the classes of the run, in their order, or start a new run from its "
            "encoder, with model.init_from."
        )

    def _check_parts(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the modules beside the encoder are others than those of the checkpoint, and name the settings."""
        theirs, ours = (
            {name: value.shape for name, value in state.items() if not name.startswith("encoder.")}
            for state in (checkpoint.get("state_dict", {}), self.state_dict())
        )
        if theirs == ours or not theirs:  # a sharded checkpoint has its weights in other files
            return
        then, now = checkpoint["hyper_parameters"], self.hparams
        changed = [line for name in now if name in then for line in _changes(name, then[name], now[name])]
        raise UserError(
            f"{type(self).__name__}: the modules beside the encoder are those of the checkpoint; got other settings: "
            f"{'; '.join(changed) or 'none by name'}. Set these of the model as in the checkpoint, or start a new run "
            "from its encoder, with model.init_from."
        )


def _draw_zero_biases(encoder: nn.Module) -> None:
    """Draw the biases of the first convolution as torch does by default, if they all are 0.

    Images are padded with 0. With fresh weights and zero biases, all features there are 0, where the slope of a layer
    norm is 1 / sqrt(eps), 1000 for MambaOut. Five in a row give gradients of 1e19, also in float64.
    """
    first = next((one for one in encoder.modules() if isinstance(one, nn.Conv2d)), None)
    if first is not None and first.bias is not None and not first.bias.is_meta and not first.bias.any():
        bound = first.weight[0].numel() ** -0.5
        nn.init.uniform_(first.bias, -bound, bound)


def _changes(name: str, then: Any, now: Any) -> list[str]:
    """Describe the settings that differ, such as `head.channels 512, now 192`; those of two kinds only by the kind."""
    if then == now or name in ("init_from", "optimizer", "schedule"):
        return []
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [f"{name} {then}, now {now}"]
    if then.get("kind") != now.get("kind"):
        return [f"{name} {then.get('kind')}, now {now.get('kind')}"]
    return [line for key in now for line in _changes(f"{name}.{key}", then.get(key), now[key])]
