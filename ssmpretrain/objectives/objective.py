"""The base class of all objectives: encoder, images of the data, optimizer, contents of checkpoints."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from typing_extensions import Self

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder, load_encoder
from ssmpretrain.encoders.features.pooled import Pooled, pooled_features
from ssmpretrain.encoders.weights.preprocessing import images_of
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.optim.adamw import OptimizerSettings
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.optimizer_state import keep_settings
from ssmpretrain.training.optim.precision import check_precision
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import FactorLR, Schedule
from ssmpretrain.training.settings import plain

_log = logging.getLogger(__name__)


class Objective(LightningModule):
    """Base class of all objectives. Subclasses define the loss.

    A subclass passes all its arguments to this class, adds its own modules beside `encoder`, and defines
    `training_step`, which returns the loss of a batch and logs it as `train/loss`. It may define `validation_step`, and
    `pooled`, the pooled feature of the encoder that stands for an image. This class does everything else: it builds the
    encoder for the image size of the data, the optimizer and the schedule. Runs of the subclass can be continued and
    validated, and `load_encoder` reads their checkpoints. A recipe names the subclass by its class path,
    `mypackage.MyObjective`.

    An encoder with a fixed image size is built for the size of the data, unless `encoder_args` sets the size.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder; they override those that `init_from` was built with.
        optimizer: Settings of the optimizer; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate, any kind of `Schedule`.
        num_outputs: Outputs of the encoder's own head, 0 for none. A head in `init_from` with this number is kept.
        **settings: Other arguments of the subclass by name: plain data, or data classes of plain data. They are saved
            as hyper-parameters too. The setting `init_from`, if the subclass has it, is the source of the encoder's
            weights: anything that `load_encoder` reads (a run, a checkpoint, an exported or a published file), or None
            for fresh weights.

    Attributes:
        encoder: The encoder that `build_encoder` returned.
        former_settings: Values that settings had in checkpoints of versions without the setting, by name. List only
            values other than the default.
        sources_of_weights: Names of settings that only name sources of initial weights. They are not used when the
            objective is restored from a checkpoint.
        reads_views: Whether training reads several views of an image, as `data.views` gives them.
        reported: Description of the weights that a run reports, if the objective itself averages its weights, as a
            teacher; else None.
        suffix: End of the names under which a validation keeps its results; empty unless this is a `twin`.

    Raises:
        ValueError: If neither `encoder` nor `init_from` is given, or the file does not fill the encoder.
    """

    encoder: Any
    former_settings: ClassVar[dict[str, Any]] = {}
    sources_of_weights: ClassVar[tuple[str, ...]] = ("init_from",)
    reads_views: ClassVar[bool] = False
    reported: ClassVar[str | None] = None
    suffix: str = ""

    def __init__(
        self,
        encoder: str | None,
        encoder_args: dict[str, Any] | None,
        optimizer: OptimizerSettings,
        schedule: Schedule,
        *,
        num_outputs: int = 0,
        **settings: Any,
    ) -> None:
        where = type(self).__name__
        if not encoder and settings.get("init_from") is None:
            raise UserError(
                f"{where}: the encoder comes by its name or from a checkpoint; got neither. "
                "Set model.encoder, e.g. vim_tiny_patch16_224, or model.init_from, e.g. runs/mae_vim_ti."
            )
        if not isinstance(schedule, Schedule):
            raise UserError(
                f"{where}: schedule holds options by name, or class_path with init_args; got {schedule!r:.60}. Leave "
                "it out for its defaults."
            )
        super().__init__()
        encoder_args = dict(encoder_args or {})
        if "num_classes" in encoder_args:
            raise UserError(f"{where}: encoder_args takes no num_classes; the objective sets the head. Leave it out.")
        self.init_from: str | None = settings.get("init_from")
        arguments = {"encoder": encoder or "", "encoder_args": encoder_args, **settings}
        arguments |= {"optimizer": optimizer, "schedule": schedule}
        self.save_hyperparameters({name: plain(value) for name, value in arguments.items()})
        self.encoder_name = encoder or ""
        self.encoder_args = encoder_args  # the same object as in hparams, so that `configure_model` adds to both
        self.optimizer_settings, self.schedule = optimizer, schedule
        self._fits_data = "img_size" not in encoder_args  # otherwise the user has chosen the size
        self._images: dict[str, Any] | None = None  # preparation of the data's images
        self._data: Any = None  # the data module
        self._length = (1, 1)  # optimizer steps of the run, and of an epoch
        self.num_outputs = num_outputs
        self.encoder = self.build_encoder()

    def build_encoder(self) -> Any:
        """Build the encoder that the run begins with. It is called again if the images of the data have another size.

        A subclass may override this to change the encoder. It finds its settings in `hparams`, because its own
        attributes are not set yet.
        """
        if self.init_from is None:
            return create_encoder(self.encoder_name, num_classes=self.num_outputs, **self.encoder_args)
        encoder: Any = load_encoder(self.init_from, self.encoder_name or None, self.num_outputs, **self.encoder_args)
        report = encoder.load_report
        self.encoder_name = self.hparams["encoder"] = report.encoder
        self.encoder_args.update({key: value for key, value in report.args.items() if key != "num_classes"})
        return encoder

    @property
    def pooled(self) -> Pooled:
        """The pooled feature of the encoder that stands for an image: the one that the run trains and reports.

        Checkpoints and exports name it, and `embed`, `knn` and `neighbours` compute it unless the user chooses another.
        """
        return Pooled()

    def pooled_vector(self, images: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, 3, H, W) that `pooled` names."""
        return pooled_features(self.encoder, images, [self.pooled])[self.pooled]

    def forward(self, images: Tensor) -> Any:
        """Compute the pooled features (B, F) of images (B, 3, H, W). A subclass may compute something else."""
        return self.pooled_vector(images)

    def evaluated_features(self, images: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, 3, H, W) that `OnlineEvaluation` evaluates: those of `forward`.

        A subclass whose `forward` is something else overrides this, so that the evaluation during training and `knn`
        judge the same features.
        """
        return self(images)  # type: ignore[no-any-return]

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Raise a `UserError` if the objective cannot use images of H, W pixels. A subclass may override this."""

    def twin(self, suffix: str) -> Self:
        """Return an objective with the same modules, for a second validation with other weights.

        The validation of the twin keeps its own results, and logs them under names that end in `suffix`.
        """
        twin = object.__new__(type(self))  # `copy.copy` would rebuild a sharded module
        vars(twin).update(vars(self), suffix=suffix)
        vars(twin)["log"] = lambda name, value, **options: self.log(name + suffix, value, **options)
        return twin

    def value_of(self, ramp: Ramp, from_epoch: float = 0) -> float:
        """Return the value of a ramp that begins at an epoch, at the present place in the run.

        Args:
            ramp: The ramp.
            from_epoch: Epochs of the run before the ramp begins, at least 0; it has its first value until then.
        """
        return ramp.at(max(0, self._place() - from_epoch * self._length[1]), *self._length)

    def epochs_done(self) -> float:
        """Return the present place in the run in epochs, from 0."""
        return self._place() / self._length[1]

    def _place(self) -> float:
        """Return the present place in the run, which is that of the learning rate, in optimizer steps from 0."""
        scheduler = self.lr_schedulers()
        return scheduler.place if isinstance(scheduler, FactorLR) else self.trainer.global_step

    # Hooks of Lightning

    def configure_model(self) -> None:
        check_precision(self.trainer)
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "image_size"):
            return
        size = data.image_size
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._images = {
            "size": list(size),
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": getattr(data, "interpolation", "bicubic"),
            "crop_pct": getattr(data, "eval_crop_ratio", 1.0),
        }
        if hasattr(data, "eval_size"):  # of dense tasks: images keep their aspect
            self._images |= {"eval_size": list(data.eval_size), "antialias": getattr(data, "antialias", False)}
        self._data = data
        self._compare_normalisation()
        self._check_views(data)
        self.check_image_size(size)
        if hasattr(self.encoder, "set_input_size") and tuple(self.encoder.patch_embed.img_size) != size:
            self._fit_encoder_to(size)

    def _check_views(self, data: Any) -> None:
        """Raise if the data give several views of an image and the objective reads one, or the other way round."""
        given = bool(getattr(data, "views", None))
        if self.reads_views and not given:
            raise UserError(
                f"{type(self).__name__}: training compares several views of an image; got data.views "
                f"{getattr(data, 'views', None)}. Set data.views, as in recipes/dino_vim_s.yaml."
            )
        if given and not self.reads_views:
            raise UserError(
                f"{type(self).__name__}: training reads one view of an image; got several in data.views. Leave "
                "data.views out, or choose an objective that compares views, such as DINO or LeJEPA."
            )

    def _compare_normalisation(self) -> None:
        """Warn if the encoder's weights come from images of another mean or deviation than the data's."""
        if self.init_from is None or self._images is None:
            return
        before, now = (
            {name: [round(float(one), 3) for one in images[name]] for name in ("mean", "std")}
            for images in (images_of(self.encoder), self._images)
        )
        if before != now:
            rank_zero_only(_log.warning)(
                "%s has seen images of mean %s and std %s; those of the data have %s and %s. Set data.mean and "
                "data.std to the former, unless you want this change.",
                self.init_from, before["mean"], before["std"], now["mean"], now["std"],
            )  # fmt: skip

    def _fit_encoder_to(self, size: tuple[int, int]) -> None:
        if self._fits_data:
            self.encoder_args["img_size"] = list(size)
            with torch.random.fork_rng(devices=[]):  # some strategies change the seed after the objective is built
                torch.manual_seed(torch.initial_seed())
                self.encoder = self.build_encoder()
        elif getattr(self.encoder.patch_embed, "strict_img_size", False):
            built_for = self.encoder_args["img_size"]
            raise UserError(
                f"{type(self).__name__}: {self.encoder_name} takes only images of the size it was built for; got "
                f"encoder_args.img_size {built_for} and data.image_size {list(size)}. Leave encoder_args.img_size out."
            )

    def build_optimizer(self, global_batch: int) -> Optimizer:
        """Build the optimizer of the trainable parameters, with the peak learning rate for `global_batch` images."""
        return self.optimizer_settings.build(self, global_batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        batch = GlobalBatch.of(self.trainer)
        self.trainer.fit_loop.setup_data()  # counts the batches, also if only max_steps ends the run
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise UserError(
                f"{type(self).__name__}: the schedule needs an end; set trainer.max_epochs or trainer.max_steps."
            )
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / batch.accumulation)
        self._length = int(total_steps), steps_per_epoch
        optimizer = self.build_optimizer(batch.size)
        rank_zero_only(_log.info)(
            "%s; global batch %s; %d steps, %d an epoch",
            self.optimizer_settings.describe(batch.size), batch, total_steps, steps_per_epoch,
        )  # fmt: skip
        self._tell_ramps(total_steps / steps_per_epoch)
        keep_settings(optimizer, self)
        in_epochs = self.trainer.max_steps == -1 or total_steps < self.trainer.max_steps
        scheduler = self.schedule.build(optimizer, int(total_steps), steps_per_epoch, in_epochs=in_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _tell_ramps(self, epochs: float) -> None:
        """Log the ramps of the objective, and warn of those that are longer than the run of so many epochs."""
        for name, ramp in ((name, ramp) for name, ramp in vars(self).items() if isinstance(ramp, Ramp)):
            rank_zero_only(_log.info)("%s: %s", name, ramp)
            if ramp.epochs is not None and ramp.epochs > epochs and ramp.start != ramp.end:
                rank_zero_only(_log.warning)(
                    "%s: the run ends at epoch %g, before %s reaches %g at epoch %g; set model.%s.epochs",
                    type(self).__name__, epochs, name, ramp.end, ramp.epochs, name,
                )  # fmt: skip

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["objective"] = type(self).__name__
        cls = next(one for one in type(self).__mro__ if not issubclass(one, FSDPModule))  # FSDP2 makes a subclass
        if not cls.__module__.startswith("ssmpretrain."):
            checkpoint["objective_class"] = f"{cls.__module__}.{cls.__qualname__}"
        checkpoint["encoder"] = {"name": self.encoder_name, "args": self.encoder_args}
        checkpoint["pooled"] = self.pooled._asdict()
        if self._images is not None:
            checkpoint["images"] = self._images
        if hasattr(self._data, "num_samples"):
            samples = self._data.num_samples("train")
            checkpoint["data"] = {"class": type(self._data).__name__, "train": self._data.train, "samples": samples}
