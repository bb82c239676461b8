"""Base of the data modules: their splits, loaders, position in training, labels and bad samples."""

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

_MOST_WORKERS = 1024  # of a rank; each is a process with torch in it


class PlannedData(LightningDataModule):
    """Base class of data modules that read by plan, resume exactly and count what they miss.

    Subclasses find the images of a split (`_open`). The arguments are those of `ImageData`, which documents them.

    Args:
        train_batcher, eval_batcher: Decode, transform and stack the samples of training and of evaluation.

    Raises:
        DataError: If an argument is out of range.
    """

    val: Any  # where the validation images are, in the subclass's own words; None for none
    _own_classes: Classes | None = None  # where a subclass names them

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
        self._found: dict[str, ImageSplit] = {}  # by split, found once
        self._bad: dict[str, BadSamples] = {}
        self._sampler: PlanSampler | None = None  # of training
        self._resume: dict[str, Any] | None = None  # where to go on
        self._labels = LabelledSets(self._label_sources, lambda: self._own_classes, self._where, judged=require_labels)
        self._fingerprint: str | None = None  # every checkpoint has it, and a folder may have millions of names

    def _check(self, holds: bool, what: str, got: object) -> None:
        if not holds:
            raise DataError(f"{self._where}: {what}; got {got}.")

    @property
    def _where(self) -> str:
        """The name that opens every message."""
        return type(self).__name__

    @property
    def _block(self) -> int:
        """Samples of a rank that are shuffled among each other, where shards are shuffled first."""
        return 1

    @property
    def _absent(self) -> tuple[type[Exception], ...]:
        """Errors of training data that evaluation does without."""
        return (FileNotFoundError,)

    @abstractmethod
    def _open(self, split: str) -> ImageSplit:
        """Find the images of a split, "train" or "val"."""

    def _has_val(self) -> bool:
        return self.val is not None

    def _images(self, split: str) -> ImageSplit:
        """Return the images of a split, found and checked once."""
        if split not in self._found:
            self._found[split] = self._open(split)
            if ranks.rank() == 0:  # once in the job
                for fault in self._found[split].faults:
                    self._bad_of(split).note(fault)
        return self._found[split]

    def _label_sources(self, split: str) -> Sequence[Labels]:
        """Return the readers of the labels of a split, in order; the same objects each time."""
        if split == "val" and not self._has_val():
            return []
        try:
            images = self._images(split)
        except self._absent:
            if split == "train" and self._has_val():  # that is evaluated without
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
        """Find and check the data, here where an error is one message and not a worker's.

        Args:
            stage: Lightning's; for any but "fit", validation data alone will do.
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
        """Names of the classes, in the order of their labels; empty where nobody says them."""
        return list(self._labels.classes.names)

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        self._own_classes = Classes(tuple(names), self._where)

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
        """Yield labels that are known before an epoch is read, each with what has it, in words; -1 where there is none.

        Of a folder that is one image of each class; of shards what their indexes count, and a few samples. Images that
        `require_labels` skips do not appear.
        """
        if split == "train" or self._has_val():
            for which, label in self._batches(split, train=False, limit=None).known_labels():
                if label >= 0 or not self.require_labels:
                    yield which, label

    def train_dataloader(self) -> EpochLoader:
        """Return a loader of shuffled, augmented, full batches, as many on every rank."""
        return self._loader("train", train=True)

    def val_dataloader(self, limit: int | None = None) -> EpochLoader | list[Any]:
        """Return a loader of each validation image once, in order; an empty list if there is no validation data.

        Args:
            limit: As in `bank_dataloader`.
        """
        if self._has_val():
            return self._loader("val", train=False, limit=limit)
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # it is meant
        return []

    def bank_dataloader(self, limit: int | None = None) -> EpochLoader:
        """Return a loader of training images as evaluation sees them, in a fixed order: for a kNN bank or a probe.

        Under several ranks each yields its part.

        Args:
            limit: Use this many images in all, evenly spread; None uses all.
        """
        return self._loader("train", train=False, limit=limit)

    def num_left_out(self) -> int:
        """Count the training samples that an epoch does not read, others each epoch; negative if it reads some twice.

        They do not fill a step on every rank; with repeats, they are those that the epoch does not read; with
        epoch_samples, those of a pass that other epochs read.
        """
        return self.num_samples("train") - self.samples_per_epoch("train")

    def fingerprint(self) -> str:
        """Return a short hash of the training data's names and sizes: equal where position and order mean the same."""
        if self._fingerprint is None:
            self._fingerprint = f"{stable_hash(repr(self._images('train').contents())):016x}"
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training, in samples that were trained: a few plain numbers, for the checkpoint."""
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
                f"{self._where}: the checkpoint was made in the middle of an epoch of other data (other "
                f"shards, or shards of other sizes); got {self.num_samples('train'):,} samples, {self.fingerprint()} "
                f"instead of {state_dict['data']}. Train on the same shards, or start a new run from the weights."
            )
        self._resume = state_dict
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)

    def bad_samples(self) -> dict[str, dict[str, dict[str, int]]]:
        """Count the samples that this rank skipped so far: {"train": {cause: {file: count}}, "val": ...}.

        "bank" are those of the training images that were read as evaluation sees them.
        """
        return {use: bad.counts() for use, bad in self._bad.items()}

    def bad_records(self) -> list[dict[str, Any]]:
        """List each of them: split, epoch, cause, shard, sample (its number there), key, detail."""
        return [{"split": use, **record._asdict()} for use, bad in self._bad.items() for record in bad.records()]

    def samples_per_epoch(self, split: str) -> int:
        """Count the samples of a split that all ranks together read in an epoch, without copies."""
        if split == "val":
            return self.num_samples("val")
        return self._num_batches() * ranks.world() * num_reads(self.batch_size, self.repeats)

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

    def _bad_of(self, use: str) -> BadSamples:
        """Return the counter of the bad samples of "train", "val" or "bank"."""
        if use not in self._bad:
            split = "train" if use == "bank" else use
            self._bad[use] = BadSamples(f"{self._where}: {split}", self.max_bad_fraction)
        return self._bad[use]

    def _try_some(self, split: str) -> None:
        """Decode a few samples of a split until one is good, to fail before any worker starts if none is."""
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
        # It is: the position is in the data module's state.
        warnings.filterwarnings("ignore", message=".* your dataloader is not resumable", category=UserWarning)
        rank = ranks.rank()
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
