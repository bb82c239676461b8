"""Samples that cannot be used: named, counted by cause and shard, tolerated up to a fraction."""

import json
import logging
from collections import Counter, defaultdict
from contextlib import suppress
from typing import NamedTuple

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.datamodules.faults.shared_lines import SharedLines

_log = logging.getLogger(__name__)
_SPOKEN = 3  # bad samples that each process reports one by one; then only at 10, 100, 1000, ...
_GRACE = (
    1000  # the fraction is taken of at least this many samples, so that one bad file among the first ten stops nothing
)
_LONGEST = 200  # characters of a key or a detail that are kept


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        cause: A short phrase that is the same for all such samples, which are counted by it. It ends in "shards" if the
            whole shard is at fault, so that one shard makes many bad samples.
        detail: The fault of this sample, for the message.
        key: The sample's name, if it could be read.
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
    """A bad sample that was met, or a damaged shard (without number and key) that was found at the start.

    Args:
        epoch: Epoch in which it was met, from 0.
        cause: As in `BadSample`.
        shard: The file that it lies in.
        sample: Its number in the shard, or -1.
        key: The sample's name, if it could be read.
        detail: The fault of this sample.
    """

    epoch: int
    cause: str
    shard: str
    sample: int
    key: str
    detail: str


class BadSamples:
    """The bad samples of a data set, noted by any worker process and counted in all of them.

    Each bad sample is a line that all workers can read (`SharedLines`). So the counts need no lock and outlive a
    worker, and the lines list what to clean. A sample that is met twice in an epoch counts once: it may be tried again
    in the place of another bad one.

    Args:
        where: Opens every message, as in "ImageShards: train".
        max_fraction: Fraction of the samples read that may be bad, in [0, 1]; more stop the run.
    """

    def __init__(self, where: str, max_fraction: float) -> None:
        self.where = where
        self.max_fraction = max_fraction
        self._lines = SharedLines()
        self._seen = self._bad = 0
        self._lost = 0  # samples of faulty shards, in this epoch
        self._met: set[tuple[str, int, str]] = set()  # likewise
        self._epoch = -1
        self._known: dict[tuple[int, str, int, str], BadRecord] = {}
        self._is_noted = True
        self._unread = SharedLines()
        self._unread_epoch = -1  # the one whose labels are counted: in each process the first
        self._unread_said = False

    def note_unread(self, epoch: int, sample: str, text: str) -> None:
        """Count a sample that is used without its label: the label cannot be read, and nothing uses labels.

        Args:
            epoch: Epoch in which it was met; only samples of the first are counted.
            sample: A short name that no other sample has.
            text: Names the sample and the reason, for the message.
        """
        first = self._unread_epoch < 0
        self._unread_epoch = epoch if first else self._unread_epoch
        if epoch == self._unread_epoch and not self._unread_said:
            with suppress(OSError):
                self._unread.append(f"{sample}\t{shown(text) if first else ''}")

    def say_unread(self) -> None:
        """Say once how many samples `note_unread` counted; when a pass over them is over."""
        lines = [] if self._unread_said else self._unread.new()
        if samples := {line.partition("\t")[0] for line in lines}:
            self._unread_said = True
            such = next((f", such as {text}" for line in lines if (text := line.partition("\t")[2])), "")
            _log.warning("%s: %s labels cannot be read and count as none%s.", self.where, f"{len(samples):,}", such)

    def count_good(self) -> None:
        """Count a usable sample."""
        self._seen += 1

    def note(self, record: BadRecord) -> None:
        """Write down a bad sample or a damaged shard."""
        cut = record._replace(key=record.key[:_LONGEST], detail=record.detail[:_LONGEST])
        try:
            self._lines.append(json.dumps(cut._asdict()))
        except OSError as error:
            if self._is_noted:
                _log.warning("%s: the list of bad samples lacks some: %s", self.where, error.strerror)
            self._is_noted = False

    def add(self, record: BadRecord, planned: int) -> None:
        """Note a bad sample and judge whether there are too many.

        Bad samples of faulty shards come in rows, so they are compared with the whole epoch. Others are compared with
        the samples that this process has read.

        Args:
            record: The bad sample.
            planned: Samples that all ranks together are to read in the epoch.

        Raises:
            DataError: If too many were bad; lists what was noted.
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
        """Return the bad samples so far, of all processes of this rank, each once an epoch, as they were met."""
        for line in self._lines.new():
            try:
                record = BadRecord(**json.loads(line))
            except ValueError:
                continue  # of a process that had no room for all of it
            self._known.setdefault((record.epoch, record.shard, record.sample, record.key), record)
        return list(self._known.values())

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the bad samples so far, over all processes and epochs: {cause: {shard: count}}."""
        return count_by_cause(self.records())

    def stop(self, reason: str) -> None:
        """Raise with the reason and the counts."""
        found = summarise(self.counts())  # nothing where other ranks met them, or all were met before a restart
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
    """Return whether more than a fraction of these samples, but of 1000 at least, are bad."""
    return bad > max_fraction * max(samples, _GRACE)


def is_of_shard(cause: str) -> bool:
    """Return whether a fault is of a whole shard, as "missing shards"."""
    return cause.endswith("shards")


def count_by_cause(records: list[BadRecord]) -> dict[str, dict[str, int]]:
    """Count records as {cause: {shard: samples}}."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.cause][record.shard] += 1
    return {cause: dict(shards) for cause, shards in counts.items()}


def summarise(counts: dict[str, dict[str, int]]) -> str:
    """Put counts in words, the most frequent cause first: "10 undecodable images in 4 files, most in a.tar"."""
    parts = []
    for cause, shards in sorted(counts.items(), key=lambda item: -sum(item[1].values())):
        worst = max(shards, key=lambda shard: shards[shard])
        samples = f"{sum(shards.values()):,} {'samples of ' if is_of_shard(cause) else ''}{cause}"
        files = f"{len(shards):,} files, most in {shown(worst)}" if len(shards) > 1 else f"1 file, {shown(worst)}"
        parts.append(f"{samples} in {files}")
    return "; ".join(parts)
