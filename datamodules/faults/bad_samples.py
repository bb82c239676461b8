"""Bad samples: they are named, counted by cause and shard, and tolerated up to a fraction."""

import json
import logging
from collections import Counter, defaultdict
from contextlib import suppress
from typing import NamedTuple

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.datamodules.faults.shared_lines import SharedLines

_log = logging.getLogger(__name__)
_SPOKEN = 3  # each process reports its first 3 bad samples one by one, then only number 10, 100, 1000, ...
_GRACE = 1000  # the fraction is taken of at least 1000 samples, so that one bad file among the first ten stops nothing
_LONGEST = 200  # largest number of characters of a key or a detail


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        cause: A short phrase, equal for all samples with the same fault; samples are counted by it. It ends in "shards"
            if the whole shard is at fault, because such a shard causes many bad samples.
        detail: The fault of this sample, used in messages.
        key: Name of the sample, if it could be read.
    """

    def __init__(self, cause: str, detail: str = "", key: str = "") -> None:
        super().__init__(cause, detail, key)
        self.cause = cause
        self.detail = detail
        self.key = key

    def describe(self) -> str:
        """Return the cause and the detail in one phrase."""
        return f"{self.cause} ({self.detail})" if self.detail else self.cause


class BadRecord(NamedTuple):
    """Record of a bad sample that was read, or of a damaged shard that was found at the start.

    Args:
        epoch: Epoch in which the sample was read, from 0.
        cause: Cause, as in `BadSample`.
        shard: File that holds the sample.
        sample: Number of the sample in the shard; -1 for a damaged shard.
        key: Name of the sample, if it could be read; empty for a damaged shard.
        detail: The fault of this sample.
    """

    epoch: int
    cause: str
    shard: str
    sample: int
    key: str
    detail: str


class BadSamples:
    """Counter of the bad samples of a data set, shared by all worker processes.

    Each bad sample is a line that all workers can read (`SharedLines`). The counts therefore need no lock and outlive a
    worker, and the lines list the samples to repair. A sample that is read twice in an epoch counts once, because it
    may be tried again as a substitute for another bad sample.

    Args:
        where: Name of the data module and split, which opens every message, as "ImageShards: train".
        max_fraction: Fraction of the samples read that may be bad, in [0, 1]. If more are bad, the run stops.
    """

    def __init__(self, where: str, max_fraction: float) -> None:
        self.where = where
        self.max_fraction = max_fraction
        self._lines = SharedLines()
        self._seen = self._bad = 0
        self._lost = 0  # samples of faulty shards, in this epoch
        self._met: set[tuple[str, int, str]] = set()  # bad samples of this epoch
        self._epoch = -1
        self._known: dict[tuple[int, str, int, str], BadRecord] = {}
        self._is_noted = True
        self._unread = SharedLines()
        self._unread_epoch = -1  # epoch whose labels are counted: the first epoch of each process
        self._unread_said = False

    def note_unread(self, epoch: int, sample: str, text: str) -> None:
        """Count a sample whose label cannot be read, in a run that does not use labels.

        Args:
            epoch: Epoch in which the sample was read; only samples of the first epoch are counted.
            sample: A short, unique name of the sample.
            text: Name of the sample and the reason, used in the message.
        """
        first = self._unread_epoch < 0
        self._unread_epoch = epoch if first else self._unread_epoch
        if epoch == self._unread_epoch and not self._unread_said:
            with suppress(OSError):
                self._unread.append(f"{sample}\t{shown(text) if first else ''}")

    def say_unread(self) -> None:
        """Log once how many samples `note_unread` counted; called after a whole pass over the samples."""
        lines = [] if self._unread_said else self._unread.new()
        if samples := {line.partition("\t")[0] for line in lines}:
            self._unread_said = True
            such = next((f", such as {text}" for line in lines if (text := line.partition("\t")[2])), "")
            _log.warning("%s: %s labels cannot be read and count as none%s.", self.where, f"{len(samples):,}", such)

    def count_good(self) -> None:
        """Count a usable sample."""
        self._seen += 1

    def note(self, record: BadRecord) -> None:
        """Record a bad sample or a damaged shard in the shared lines."""
        cut = record._replace(key=record.key[:_LONGEST], detail=record.detail[:_LONGEST])
        try:
            self._lines.append(json.dumps(cut._asdict()))
        except OSError as error:
            if self._is_noted:
                _log.warning("%s: the list of bad samples lacks some: %s", self.where, error.strerror)
            self._is_noted = False

    def add(self, record: BadRecord, planned: int) -> None:
        """Record a bad sample, and stop the run if there are too many.

        Bad samples of faulty shards follow one another, so their number is compared with the samples of the whole
        epoch. The number of other bad samples is compared with the samples that this process has read.

        Args:
            record: The bad sample.
            planned: Number of samples that all ranks together read in the epoch.

        Raises:
            DataError: If too many samples are bad. The message lists the recorded causes.
        """
        if record.epoch != self._epoch:
            self._epoch, self._lost, self._met = record.epoch, 0, set()
        if (record.shard, record.sample, record.key) in self._met:
            return
        self._met.add((record.shard, record.sample, record.key))
        self.note(record)
        whole = is_of_shard(record.cause)
        self._lost += whole
        self._seen += not whole
        self._bad += not whole
        self._say(record)
        if too_many(self._bad, self._seen, self.max_fraction) or too_many(self._lost, planned, self.max_fraction):
            self.stop(f"more than {self.max_fraction:.2%} of the samples are unusable")

    def records(self) -> list[BadRecord]:
        """Return the bad samples of all processes of this rank, in the order of reading, each once per epoch."""
        for line in self._lines.new():
            try:
                record = BadRecord(**json.loads(line))
            except ValueError:
                continue  # a line that was cut because there was no room for it
            self._known.setdefault((record.epoch, record.shard, record.sample, record.key), record)
        return list(self._known.values())

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the bad samples over all processes and epochs so far, as {cause: {shard: count}}."""
        return count_by_cause(self.records())

    def stop(self, reason: str) -> None:
        """Raise a DataError with the reason and the counts."""
        found = summarise(self.counts())  # empty if only other ranks, or only the run before a restart, met bad samples
        raise DataError(
            f"{self.where}: {reason}{': ' if found else ''}{found}. "
            "Clean the data (`ssmpretrain shards verify` lists what is wrong in shards), or raise max_bad_fraction."
        )

    def _say(self, record: BadRecord) -> None:
        number = self._bad + self._lost
        if number <= _SPOKEN or str(number).strip("0") == "1":
            what = f"{record.cause} ({record.detail})" if record.detail else record.cause
            skipped = shown(f"{record.key or f'sample {record.sample}'} in {record.shard}: {what}")
            _log.warning("%s: skipped %s. (%d so far)", self.where, skipped, number)


def too_many(bad: int, samples: int, max_fraction: float) -> bool:
    """Return whether `bad` is more than `max_fraction` of the samples, of which at least 1000 are assumed."""
    return bad > max_fraction * max(samples, _GRACE)


def is_of_shard(cause: str) -> bool:
    """Return whether the cause is the fault of a whole shard, as "missing shards"."""
    return cause.endswith("shards")


def count_by_cause(records: list[BadRecord]) -> dict[str, dict[str, int]]:
    """Count the records by cause and shard, as {cause: {shard: number of samples}}."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.cause][record.shard] += 1
    return {cause: dict(shards) for cause, shards in counts.items()}


def summarise(counts: dict[str, dict[str, int]]) -> str:
    """Return the counts as text, most frequent cause first: "10 undecodable images in 4 files, most in a.tar"."""
    parts = []
    for cause, shards in sorted(counts.items(), key=lambda item: -sum(item[1].values())):
        worst = max(shards, key=lambda shard: shards[shard])
        samples = f"{sum(shards.values()):,} {'samples of ' if is_of_shard(cause) else ''}{cause}"
        files = f"{len(shards):,} files, most in {shown(worst)}" if len(shards) > 1 else f"1 file, {shown(worst)}"
        parts.append(f"{samples} in {files}")
    return "; ".join(parts)
