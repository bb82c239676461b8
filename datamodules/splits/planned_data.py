"""Base class of the data modules: their splits, loaders, position in training, labels and bad samples."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import stable_hash
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.faults.bad_samples import BadSamples, too_many
from ssmpretrain.datamodules.labels.classes import Classes, Labels
from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import EpochLoader, PlanSampler, begin_worker
from ssmpretrain.datamodules.order.plan import MOST_SAMPLES, Order, Stage, num_reads, num_train_batches
from ssmpretrain.datamodules.order.trial import try_some
from ssmpretrain.datamodules.splits.image_split import ImageSplit

_MOST_WORKERS = 1024  # workers of a rank; each is a process that imports torch


class PlannedData(LightningDataModule):
    """Base class of data modules that read by a plan, resume exactly, and count bad samples.

    Subclasses implement `_open`, which finds the images of a split. `ImageData` documents the other arguments.

    Args:
        train_batcher, eval_batcher: Decode, transform and stack the samples of training and of evaluation.

    Raises:
        DataError: If an argument is out of range.
    """

    val: Any  # validation images, in the form that the subclass takes; None for none
    _own_classes: Classes | None = None  # set if a subclass names its classes

    def __init__(
        self,
        *,
        train_batcher: Batcher,
        eval_batcher: Batcher,
        batch_size: int,
        num_workers: int,
        repeats: int,
        epoch_samples: int | None,
        remainder: str,
        seed: int,
        max_bad_fraction: float,
        require_labels: bool,
    ) -> None:
        super().__init__()
        self._check(isinstance(batch_size, int) and batch_size > 0, "batch_size is at least 1", batch_size)
        self._check(0 <= num_workers <= _MOST_WORKERS, f"num_workers is from 0 to {_MOST_WORKERS:,}", num_workers)
        self._check(isinstance(repeats, int) and repeats > 0, "repeats is at least 1", repeats)
        holds = epoch_samples is None or (isinstance(epoch_samples, int) and 0 < epoch_samples <= MOST_SAMPLES)
        self._check(holds, f"epoch_samples is from 1 to {MOST_SAMPLES:,}, or null", epoch_samples)
        self._check(remainder in ("drop", "repeat"), "remainder is drop or repeat", remainder)
        self._check(0 <= max_bad_fraction <= 1, "max_bad_fraction is in [0, 1]", max_bad_fraction)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self.epoch_samples = epoch_samples
        self.remainder = remainder
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.require_labels = require_labels
        self._train_batcher, self._eval_batcher = train_batcher, eval_batcher
        self._found: dict[str, ImageSplit] = {}  # splits that were opened, by name
        self._bad: dict[str, BadSamples] = {}
        self._sampler: PlanSampler | None = None  # the sampler of training
        self._resume: dict[str, Any] | None = None  # position at which training continues
        self._labels = LabelledSets(self._label_sources, lambda: self._own_classes, self._where, judged=require_labels)
        self._fingerprint: str | None = None  # computed once, because a folder may have millions of names

    def _check(self, holds: bool, what: str, got: object) -> None:
        if not holds:
            raise DataError(f"{self._where}: {what}; got {got}.")

    @property
    def _where(self) -> str:
        """Name of the class, which opens every message."""
        return type(self).__name__

    @property
    def _block(self) -> int:
        """Number of samples that a rank shuffles together; 1 if shards hold one sample each."""
        return 1

    @property
    def _absent(self) -> tuple[type[Exception], ...]:
        """Errors that mean that training data are missing; an evaluation ignores them."""
        return (FileNotFoundError,)

    @abstractmethod
    def _open(self, split: str) -> ImageSplit:
        """Find the images of a split, "train" or "val"."""

    def _has_val(self) -> bool:
        return self.val is not None

    def _images(self, split: str) -> ImageSplit:
        """Return the images of a split; find and check them at the first call."""
        if split not in self._found:
            self._found[split] = self._open(split)
            if ranks.rank() == 0:  # once in the job
                for fault in self._found[split].faults:
                    self._bad_of(split).note(fault)
        return self._found[split]

    def _label_sources(self, split: str) -> Sequence[Labels]:
        """Return the label readers of a split, in order. Every call returns the same objects."""
        if split == "val" and not self._has_val():
            return []
        try:
            images = self._images(split)
        except self._absent:
            if split == "train" and self._has_val():  # evaluation does not need the training data
                return []
            raise
        return images.labels

    def _batches(self, split: str, *, train: bool, limit: int | None) -> PlannedBatches:
        order = Order(self.seed, self._block, self.repeats, self.epoch_samples, self.remainder)
        images = self._images(split)
        self._labels.number(split)
        return images.batches(
            limit=limit,
            batcher=self._train_batcher if train else self._eval_batcher,
            order=order if train else None,
            bad=self._bad_of(split if train or split == "val" else "bank"),
        )

    def num_samples(self, split: str) -> int:
        """Return the number of samples in a split, "train" or "val"."""
        return self._images(split).num_samples

    def setup(self, stage: str | None = None) -> None:
        """Find and check the data before a worker starts, so that an error is one clear message.

        Args:
            stage: Stage of Lightning. All stages but "fit" need only the validation data, if there are any.

        Raises:
            FileNotFoundError: If data are missing.
            DataError: If the data cannot be used, or training has less than one full batch on each rank.
        """
        if stage in (None, "fit") or not self._has_val():
            world = ranks.world()
            if self._num_batches() == 0:
                each = f" on each of {world} ranks" if world > 1 else ""
                samples, remedy = f"{self.num_samples('train'):,} samples", "Use a smaller batch_size"
                if self.epoch_samples is not None:
                    samples, remedy = (
                        f"epoch_samples {self.epoch_samples:,}",
                        "Raise it, or lower batch_size",
                    )
                raise DataError(
                    f"{self._where}: training needs one full batch{each}; got batch_size {self.batch_size:,} "
                    f"and {samples}. {remedy}."
                )
            self._try_some("train")
        if self._has_val():
            self._try_some("val")

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels; empty if they are not known."""
        return list(self._labels.classes.names)

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        self._own_classes = Classes(tuple(names), self._where)

    def label_by(self, names: Sequence[str], source: str) -> None:
        """Number all labels by a list of classes, such as the list in a checkpoint; call it before labels are read.

        Args:
            names: Names of the classes, in the order of their labels.
            source: Origin of the list, such as a checkpoint; used in messages.

        Raises:
            DataError: If the data have a class that the list lacks.
        """
        self._labels.number_by(Classes(tuple(names), source))

    def use_labels(self) -> None:
        """Announce that labels are used. From now on, a sample with an unreadable label counts as bad.

        Raises:
            DataError: If the classes of two sources contradict each other, or no sample of the first few can be used.
        """
        self._labels.use()
        for split in self._labels.splits:
            self._try_some(split)

    def known_labels(self, split: str) -> Iterator[tuple[str, int]]:
        """Yield (description of a sample, label) for labels that are known before an epoch is read; -1 for no label.

        A folder gives one image of each class. Shards give the counts in their indexes, and a few samples. Images that
        `require_labels` excludes do not appear.
        """
        if split == "train" or self._has_val():
            for which, label in self._batches(split, train=False, limit=None).known_labels():
                if label >= 0 or not self.require_labels:
                    yield which, label

    def train_dataloader(self) -> EpochLoader:
        """Return a loader of shuffled, augmented, full batches; every rank has the same number."""
        return self._loader("train", train=True)

    def val_dataloader(self, limit: int | None = None) -> EpochLoader | list[Any]:
        """Return a loader that reads each validation image once, in order; an empty list without validation data.

        Args:
            limit: Number of images to use in all, evenly spread; None uses all.
        """
        if self._has_val():
            return self._loader("val", train=False, limit=limit)
        # The empty list is intended.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def bank_dataloader(self, limit: int | None = None) -> EpochLoader:
        """Return a loader of training images without augmentation, in a fixed order, for a kNN bank or a probe.

        With several ranks, each rank reads a part of the images.

        Args:
            limit: Number of images to use in all, evenly spread; None uses all.
        """
        return self._loader("train", train=False, limit=limit)

    def fingerprint(self) -> str:
        """Return a short hash of the names and sizes of the training data.

        Two data sets with the same hash have the same order, so a position in one is valid in the other.
        """
        if self._fingerprint is None:
            self._fingerprint = f"{stable_hash(repr(self._images('train').contents())):016x}"
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training for a checkpoint, as a few plain numbers; see `PlanSampler.state_dict`."""
        if self._sampler is None:
            return {}
        in_flight = 0
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            in_flight = progress.ready - progress.processed
        return {**self._sampler.state_dict(in_flight), "data": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint. Samples that were trained in its epoch are not read again.

        If the number of ranks changed, the new ranks divide the rest of the epoch.

        Raises:
            DataError: If the checkpoint lies in the middle of an epoch, and the data or the global batch size changed.
        """
        if not state_dict["complete"] and state_dict["data"] != self.fingerprint():
            raise DataError(
                f"{self._where}: the checkpoint was made in the middle of an epoch of other data (other "
                f"shards, or shards of other sizes); got {self.num_samples('train'):,} samples, {self.fingerprint()} "
                f"instead of {state_dict['data']}. Train on the same shards, or start a new run from the weights."
            )
        self._resume = state_dict
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)

    def bad_samples(self) -> dict[str, dict[str, dict[str, int]]]:
        """Count the samples that this rank skipped so far, as {"train": {cause: {file: count}}, "val": ...}.

        The key "bank" counts training images that were read without augmentation.
        """
        return {use: bad.counts() for use, bad in self._bad.items()}

    def bad_records(self) -> list[dict[str, Any]]:
        """List the skipped samples: split, epoch, cause, shard, sample (its number in the shard), key and detail."""
        return [{"split": use, **record._asdict()} for use, bad in self._bad.items() for record in bad.records()]

    def samples_per_epoch(self, split: str) -> int:
        """Return the number of samples of a split that all ranks together read in an epoch, copies not counted."""
        if split == "val":
            return self.num_samples("val")
        return self._num_batches() * ranks.world() * num_reads(self.batch_size, self.repeats)

    def check_bad(self, split: str, bad: int, samples: int) -> None:
        """Raise if too many samples of an epoch were bad on all ranks together.

        Args:
            split: "train" or "val".
            bad: Number of bad samples.
            samples: Number of samples that were read.

        Raises:
            DataError: If the fraction of bad samples is larger than `max_bad_fraction`.
        """
        if too_many(bad, samples, self.max_bad_fraction):
            self._bad_of(split).stop(
                f"{bad:,} of the {samples:,} samples of the epoch were unusable, more than {self.max_bad_fraction:.2%}"
            )

    def _bad_of(self, use: str) -> BadSamples:
        """Return the counter of the bad samples of "train", "val" or "bank"."""
        if use not in self._bad:
            split = "train" if use == "bank" else use
            self._bad[use] = BadSamples(f"{self._where}: {split}", self.max_bad_fraction)
        return self._bad[use]

    def _try_some(self, split: str) -> None:
        """Decode a few samples of a split, and raise before a worker starts if none of them can be used."""
        batches = self._batches(split, train=False, limit=None)
        try_some(batches, self._where, split, self._labels)

    def _stage(self) -> Stage:
        accumulate = 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)
        return Stage(ranks.world(), self.batch_size, accumulate)

    def _num_batches(self) -> int:
        """Return the number of training batches of each rank in an epoch."""
        return num_train_batches(self.epoch_samples or self.num_samples("train"), self._stage(), self.remainder)

    def _loader(self, split: str, *, train: bool, limit: int | None = None) -> EpochLoader:
        if limit is not None and limit < 1:
            raise DataError(f"{self._where}: limit is at least 1; got {limit}.")
        batches = self._batches(split, train=train, limit=limit)
        self._labels.say_unused()
        # The loader is resumable: the state of the data module holds its position.
        warnings.filterwarnings("ignore", message=".* your dataloader is not resumable", category=UserWarning)
        rank = ranks.rank()
        same = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = PlanSampler(partial(batches.num_batches, rank), self._stage(), rank, same)
        if train:
            earlier, self._sampler = self._sampler, sampler
            if earlier is not None and self.trainer is not None and self.trainer.current_epoch > earlier.epoch:
                sampler.load_state_dict(earlier.state_dict())  # the trainer requests a new loader each epoch
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
            generator=torch.Generator(),  # else a loader draws from the global generator each epoch
        )
