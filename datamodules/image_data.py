"""What the image data modules have in common: their arguments, transforms and loaders."""

import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.bad_samples import (
    BadRecord,
    BadSample,
    BadSamples,
    count_by_cause,
    summarise,
    too_many,
)
from ssmpretrain.datamodules.decoding.augmentation import check_policy, colour_augmentation
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.samples import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    MAX_PIXELS,
    Batcher,
    ImageTransform,
    check_crop_ratio,
    check_image_size,
)
from ssmpretrain.datamodules.labels.classes import Classes, Labels
from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import EpochLoader, PlanSampler, begin_worker, rank_and_world
from ssmpretrain.datamodules.order.plan import MOST_SAMPLES, Order, Stage, num_reads, num_train_batches, stable_hash

_TRIED_IN_SETUP = 16
_MOST_WORKERS = 1024  # of a rank; each is a process with torch in it


class ImageData(LightningDataModule):
    """Arguments and behaviour shared by `ImageShards` and `ImageFolder`.

    The defaults are MAE's augmentation. Other runs add to it, in this order: crop, flip, auto_augment, color_jitter,
    photometric, normalisation, random_erasing. All of it is a function of seed, epoch, sample and copy alone.

    Args:
        batch_size: Samples per batch on one device; copies of an image count.
        num_workers: Processes that decode images on each rank; 0 decodes in the main process.
        image_size: Side of the square images in pixels, or (height, width).
        crop_scale: Area of the random training crop as a fraction of the image, (least, most) in (0, 1].
        horizontal_flip: Whether a training image is mirrored half of the time; not for digits or text.
        interpolation: "bicubic" or "bilinear", of the crops in training and evaluation and of auto_augment.
        auto_augment: timm's policy for training images, such as "rand-m9-mstd0.5-inc1", "original-mstd0.5", "3a" or
            "augmix-m5-w4-d2"; null for none. What comes into the image from outside has the colour `mean`.
        color_jitter: Strength with which brightness, contrast and saturation of a training image vary, at least 0. As
            in timm it does nothing beside auto_augment, unless that is a 3a policy: published recipes state both.
        photometric: Jitter with the hue, grayscale, blur and solarising of a training image, each with its probability,
            as contrastive and self-distilling methods state them; see `Photometric`. Null for none.
        random_erasing: Probability that a rectangle of a training image becomes normal noise, in [0, 1]: a fiftieth to
            a third of the area, after normalisation.
        repeats: Repeated augmentation: read one training image in `repeats` each epoch (in `repeats` epochs, each
            once), decode it once, and augment it this often for one batch, the last of a batch as often as fits. An
            epoch keeps its number of batches. DeiT's sampler gives the copies to different ranks; here they stay on
            one, half a batch or more from where mixup (sample i with sample B - 1 - i) would pair them.
        epoch_samples: Samples of an epoch, copies counted, whatever the size of the data; null for all of them. An
            epoch begins where the one before ended, and every sample is read once before any is read again.
        remainder: What becomes of training samples that do not fill an optimizer step on every rank: "drop" leaves
            them out, others each epoch; "repeat" fills the step with samples from the start of the epoch.
        eval_crop_ratio: Fraction of the side that the evaluation's centre crop keeps, in (0, 1]; images are resized to
            image_size / eval_crop_ratio before, at most 100,000,000 pixels.
        mean: Per channel, of images in [0, 1], subtracted.
        std: Per channel, of images in [0, 1], divided by; positive.
        seed: Decides order and augmentation, together with the epoch.
        max_bad_fraction: Fraction of the samples read that may be unusable, in [0, 1]; above it (and above 10
            samples, at the default) the run stops.
        max_pixels: An image whose header says that it has more is a bad sample and is not decoded.
        require_labels: Whether a sample without a label is a bad one; else its label is -1.

    Raises:
        DataError: If an argument is out of range.
    """

    _own_classes: Classes | None = None  # where a subclass names them

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 2,
        image_size: int | tuple[int, int] = 224,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        horizontal_flip: bool = True,
        interpolation: str = "bicubic",
        auto_augment: str | None = None,
        color_jitter: float = 0.0,
        photometric: Photometric | None = None,
        random_erasing: float = 0.0,
        repeats: int = 1,
        epoch_samples: int | None = None,
        remainder: str = "drop",
        eval_crop_ratio: float = 0.875,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        require_labels: bool = False,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.image_size = check_image_size(image_size, where)
        _check(isinstance(batch_size, int) and batch_size > 0, where, "batch_size is at least 1", batch_size)
        _check(0 <= num_workers <= _MOST_WORKERS, where, f"num_workers is from 0 to {_MOST_WORKERS:,}", num_workers)
        _check(_is_range(crop_scale), where, "crop_scale is (least, most) with 0 < least <= most <= 1", crop_scale)
        _check(interpolation in INTERPOLATIONS, where, f"interpolation is {' or '.join(INTERPOLATIONS)}", interpolation)
        check_policy(auto_augment, where)
        _check(0 <= color_jitter < math.inf, where, "color_jitter is finite and at least 0", color_jitter)
        once = color_jitter == 0 or photometric is None
        _check(once, where, "color_jitter and photometric both set the jitter; one of them is left out", color_jitter)
        _check(0 <= random_erasing <= 1, where, "random_erasing is a probability in [0, 1]", random_erasing)
        _check(isinstance(repeats, int) and repeats > 0, where, "repeats is at least 1", repeats)
        holds = epoch_samples is None or (isinstance(epoch_samples, int) and 0 < epoch_samples <= MOST_SAMPLES)
        _check(holds, where, f"epoch_samples is from 1 to {MOST_SAMPLES:,}, or null", epoch_samples)
        _check(remainder in ("drop", "repeat"), where, "remainder is drop or repeat", remainder)
        check_crop_ratio(eval_crop_ratio, self.image_size, where)
        holds = len(mean) == 3 and all(map(math.isfinite, mean))
        _check(holds, where, "mean has three finite numbers, of the channels in [0, 1]", mean)
        holds = len(std) == 3 and all(0 < value < math.inf for value in std)
        _check(holds, where, "std has three positive, finite numbers, of the channels in [0, 1]", std)
        _check(0 <= max_bad_fraction <= 1, where, "max_bad_fraction is in [0, 1]", max_bad_fraction)
        _check(max_pixels > 0, where, "max_pixels is at least 1", max_pixels)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.repeats = repeats
        self.epoch_samples = epoch_samples
        self.remainder = remainder
        self.mean, self.std = mean, std
        self.interpolation = interpolation
        self.eval_crop_ratio = eval_crop_ratio
        self.max_bad_fraction = max_bad_fraction
        colour = colour_augmentation(auto_augment, color_jitter, self.image_size, mean, interpolation, photometric)
        augment = ImageTransform(self.image_size, crop_scale, horizontal_flip, eval_crop_ratio, interpolation, colour)
        centre = ImageTransform(self.image_size, None, False, eval_crop_ratio, interpolation)
        self.max_pixels, self.require_labels = max_pixels, require_labels
        common: dict[str, Any] = {"mean": mean, "std": std, "seed": seed}
        common |= {"max_pixels": max_pixels, "require_labels": require_labels}
        self._train_batcher = self._batcher(transform=augment, random_erasing=random_erasing, **common)
        self._eval_batcher = self._batcher(transform=centre, **common)
        self._bad: dict[str, BadSamples] = {}
        self._sampler: PlanSampler | None = None  # of training
        self._resume: dict[str, Any] | None = None  # where to go on
        self._labels = LabelledSets(self._label_sources, lambda: self._own_classes, where, judged=require_labels)
        self._fingerprint: str | None = None  # every checkpoint has it, and a folder may have millions of names
        # Read only, by what reports how a model was trained.
        self.crop_scale, self.horizontal_flip, self.random_erasing = crop_scale, horizontal_flip, random_erasing
        self.auto_augment, self.color_jitter, self.photometric = auto_augment, color_jitter, photometric

    def _batcher(self, **options: Any) -> Batcher:
        """What turns raw samples into batches, by the arguments of `Batcher`."""
        return Batcher(**options)

    @abstractmethod
    def num_samples(self, split: str) -> int:
        """Samples in a split, "train" or "val"."""

    @abstractmethod
    def _has_val(self) -> bool: ...

    @abstractmethod
    def _contents(self) -> list[tuple[str, int]]:
        """(name, samples) of each training shard, in order."""

    @abstractmethod
    def _label_sources(self, split: str) -> Sequence[Labels]:
        """How the labels of each source of a split are read, in order; the same objects each time."""

    @abstractmethod
    def _batches(self, split: str, *, train: bool, limit: int | None) -> PlannedBatches: ...

    def setup(self, stage: str | None = None) -> None:
        """Find and check the data, here where an error is one message and not a worker's.

        Args:
            stage: Lightning's; for any but "fit", validation data alone will do.
        """
        if stage in (None, "fit") or not self._has_val():
            world = rank_and_world()[1]
            if self._num_batches() == 0:
                ranks = f" on each of {world} ranks" if world > 1 else ""
                samples, remedy = f"{self.num_samples('train'):,} samples", "Use a smaller batch_size"
                if self.epoch_samples is not None:
                    samples, remedy = (
                        f"epoch_samples {self.epoch_samples:,}",
                        "Raise it, or lower batch_size",
                    )
                raise DataError(
                    f"{type(self).__name__}: training needs one full batch{ranks}; got batch_size {self.batch_size:,} "
                    f"and {samples}. {remedy}."
                )
            self._try_some("train")
        if self._has_val():
            self._try_some("val")

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels; empty where nobody says them."""
        return list(self._labels.classes.names)

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        self._own_classes = Classes(tuple(names), type(self).__name__)

    def label_by(self, names: Sequence[str], source: str) -> None:
        """Number all labels as this list does, before they are read.

        Args:
            names: Of classes, in the order of their labels.
            source: What says them, for messages: a checkpoint.

        Raises:
            DataError: If the data have a class that the list lacks.
        """
        self._labels.number_by(Classes(tuple(names), source))

    def use_labels(self) -> None:
        """Say that labels will be used: from now on one that cannot be read makes a bad sample.

        Raises:
            DataError: If sources of training images contradict one another, or no label of some samples can be read.
        """
        self._labels.use()
        for split in self._labels.splits:
            self._try_some(split)

    def known_labels(self, split: str) -> Iterator[tuple[str, int]]:
        """Labels that are known before an epoch is read, each with what has it, in words; -1 where there is none.

        Of a folder that is one image of each class; of shards what their indexes count, and a few samples. Images that
        `require_labels` skips do not appear.
        """
        if split == "train" or self._has_val():
            for which, label in self._batches(split, train=False, limit=None).known_labels():
                if label >= 0 or not self.require_labels:
                    yield which, label

    def train_dataloader(self) -> EpochLoader:
        """Shuffled, augmented, full batches, equally many on every rank."""
        return self._loader("train", train=True)

    def val_dataloader(self, limit: int | None = None) -> EpochLoader | list[Any]:
        """Each validation image once, in order; an empty list if there is no validation data.

        Args:
            limit: As in `bank_dataloader`.
        """
        if self._has_val():
            return self._loader("val", train=False, limit=limit)
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # it is meant
        return []

    def bank_dataloader(self, limit: int | None = None) -> EpochLoader:
        """Training images as evaluation sees them, in a fixed order: a kNN bank, or what a probe is fitted to.

        Under several ranks each yields its part.

        Args:
            limit: Use this many images in all, evenly spread; None uses all.
        """
        return self._loader("train", train=False, limit=limit)

    def others(self, paths: str | list[str]) -> "ImageData":
        """A data module of other labelled images for validation, prepared and read as those of this one.

        Args:
            paths: An image folder with a sub-folder per class, or shards as `ImageShards` takes them.
        """
        from ssmpretrain.datamodules.images_in import images_in  # which knows the data modules, and they this class

        names = ("batch_size", "num_workers", "image_size", "interpolation", "eval_crop_ratio", "mean", "std")
        options = {name: getattr(self, name) for name in (*names, "max_bad_fraction", "max_pixels")}
        return images_in(paths, paths, **options)

    def num_left_out(self) -> int:
        """Training samples that an epoch does not read, others each epoch; negative if it reads some twice.

        They do not fill a step on every rank; with repeats, they are those that the epoch does not read; with
        epoch_samples, those of a pass that other epochs read.
        """
        return self.num_samples("train") - self.samples_per_epoch("train")

    def fingerprint(self) -> str:
        """A short hash of the names and sizes of what is trained on: equal where position and order mean the same."""
        if self._fingerprint is None:
            self._fingerprint = f"{stable_hash(repr(self._contents())):016x}"
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Where training is, in samples that were trained: a few plain numbers, for the checkpoint."""
        if self._sampler is None:
            return {}
        in_flight = 0
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            in_flight = progress.ready - progress.processed
        return {**self._sampler.state_dict(in_flight), "data": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was made: nothing that was trained in its epoch is read again.

        With other ranks, what is left of the epoch is shared out anew.

        Raises:
            DataError: In mid-epoch, if the data are others, or the global batch is another.
        """
        if not state_dict["complete"] and state_dict["data"] != self.fingerprint():
            raise DataError(
                f"{type(self).__name__}: the checkpoint was made in the middle of an epoch of other data (other "
                f"shards, or shards of other sizes); got {self.num_samples('train'):,} samples, {self.fingerprint()} "
                f"instead of {state_dict['data']}. Train on the same shards, or start a new run from the weights."
            )
        self._resume = state_dict
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)

    def bad_samples(self) -> dict[str, dict[str, dict[str, int]]]:
        """Samples skipped by this rank so far, over all epochs: {"train": {cause: {file: count}}, "val": ...}.

        "bank" are those of the training images that were read as evaluation sees them.
        """
        return {use: bad.counts() for use, bad in self._bad.items()}

    def bad_records(self) -> list[dict[str, Any]]:
        """Each of them: split, epoch, cause, shard, sample (its number there), key, detail."""
        return [{"split": use, **record._asdict()} for use, bad in self._bad.items() for record in bad.records()]

    def samples_per_epoch(self, split: str) -> int:
        """Samples of a split that all ranks together read in an epoch, copies not counted."""
        if split == "val":
            return self.num_samples("val")
        return self._num_batches() * rank_and_world()[1] * num_reads(self.batch_size, self.repeats)

    def check_bad(self, split: str, bad: int, samples: int) -> None:
        """Stop if too many samples of an epoch were bad, over all ranks.

        Args:
            split: "train" or "val".
            bad: How many.
            samples: How many were read.

        Raises:
            DataError: If they are more than `max_bad_fraction`.
        """
        if too_many(bad, samples, self.max_bad_fraction):
            self._bad_of(split).stop(
                f"{bad:,} of the {samples:,} samples of the epoch were unusable, more than {self.max_bad_fraction:.2%}"
            )

    def _batch_options(self, split: str, *, train: bool, block: int) -> dict[str, Any]:
        """Arguments of `PlannedBatches` that do not depend on where the images come from."""
        order = Order(self.seed, block, self.repeats, self.epoch_samples, self.remainder)
        return {
            "batcher": self._train_batcher if train else self._eval_batcher,
            "order": order if train else None,
            "bad": self._bad_of(split if train or split == "val" else "bank"),
        }

    def _bad_of(self, use: str) -> BadSamples:
        """What notes the bad samples of "train", "val" or "bank"."""
        if use not in self._bad:
            split = "train" if use == "bank" else use
            self._bad[use] = BadSamples(f"{type(self).__name__}: {split}", self.max_bad_fraction)
        return self._bad[use]

    def _try_some(self, split: str) -> None:
        """Decode a few samples of a split until one is good, to fail before any worker starts if none is.

        Raises:
            DataError: If none of them can be used.
        """
        batches = self._batches(split, train=False, limit=None)
        found: list[BadRecord] = []
        for shard, sample in batches.spread(_TRIED_IN_SETUP):
            key = f"sample {sample}"
            try:
                raw = batches.read(shard, sample)
                key = raw["__key__"]
                labels = batches.labels_of(shard)
                batches.batcher.decode(raw, labels)
                self._labels.say_of(labels, raw, f"{split}: {key} in {batches.source(shard)[0]}")
                return
            except BadSample as bad:
                source = batches.source(shard)[0]
                found.append(BadRecord(0, bad.cause, source, sample, bad.key or key, bad.describe()))
        causes = Counter(record.cause for record in found)
        first = next(record for record in found if record.cause == causes.most_common(1)[0][0])
        raise DataError(
            f"{type(self).__name__}: {split}: none of {len(found)} samples tried can be used: "
            f"{summarise(count_by_cause(found))}; such as {first.key} in {first.shard}: {first.detail}. Check the data."
        )

    def _stage(self) -> Stage:
        accumulate = 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)
        return Stage(rank_and_world()[1], self.batch_size, accumulate)

    def _num_batches(self) -> int:
        """Training batches of each rank in an epoch."""
        return num_train_batches(self.epoch_samples or self.num_samples("train"), self._stage(), self.remainder)

    def _loader(self, split: str, *, train: bool, limit: int | None = None) -> EpochLoader:
        if limit is not None and limit < 1:
            raise DataError(f"{type(self).__name__}: limit is at least 1; got {limit}.")
        batches = self._batches(split, train=train, limit=limit)
        self._labels.say_unused()
        # It is: the position is in the data module's state.
        warnings.filterwarnings("ignore", message=".* your dataloader is not resumable", category=UserWarning)
        rank = rank_and_world()[0]
        same = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = PlanSampler(partial(batches.num_batches, rank), self._stage(), rank, same)
        if train:
            earlier, self._sampler = self._sampler, sampler
            if earlier is not None and self.trainer is not None and self.trainer.current_epoch > earlier.epoch:
                sampler.load_state_dict(earlier.state_dict())  # the trainer asks for a loader anew each epoch
            elif self._resume is not None:
                sampler.load_state_dict(self._resume)
        return EpochLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # a loader draws a number per epoch, by default from the global generator
        )


def _check(holds: bool, where: str, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"{where}: {what}; got {got}.")


def _is_range(scale: Sequence[float]) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
