"""Samples that cannot be used: named, counted by cause and shard, tolerated up to a fraction."""

import json
import logging
import os
import tempfile
import weakref
from collections import Counter, defaultdict
from pathlib import Path

from ssmpretrain.datamodules.errors import DataError

_log = logging.getLogger(__name__)
_SPOKEN = 3  # bad samples that each process reports one by one; then only at 10, 100, 1000, ...
_GRACE = (
    1000  # the fraction is taken of at least this many samples, so that one bad file among the first ten stops nothing
)


class BadSample(Exception):
    """One sample cannot be used.

    Args:
        cause: A short phrase that does not depend on the sample: what is counted.
        detail: What this sample has, for the message.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def describe(self) -> str:
        """The cause, and what this sample has."""
        return f"{self.cause} ({self.detail})" if self.detail else self.cause


class BadSamples:
    """The bad samples of a data set, noted by any worker process and counted in all of them.

    Each one is a line appended to a file that the workers share (one write of less than a page each), so the counts
    need no lock, outlive a worker, and are the list to clean the data with.

    Args:
        where: Opens every message, as in "ImageShards: train".
        max_fraction: Fraction of the samples read that may be bad, in [0, 1]; more stop the run.
    """

    def __init__(self, where: str, max_fraction: float) -> None:
        self.where = where
        self.max_fraction = max_fraction
        handle, name = tempfile.mkstemp(prefix="ssmpretrain-bad-", suffix=".jsonl")
        os.close(handle)
        self.path = Path(name)
        self._seen = self._bad = 0
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        del state["_finalizer"]  # the process that made the file removes it
        return state

    def count_good(self) -> None:
        """Count a usable sample."""
        self._seen += 1

    def add(self, bad: BadSample, shard: str, key: str) -> None:
        """Note a bad sample.

        Raises:
            DataError: If too many of those read by this process were bad; lists what was noted.
        """
        self._seen += 1
        self._bad += 1
        line = json.dumps({"cause": bad.cause, "shard": shard, "key": key[:200]}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._bad <= _SPOKEN or str(self._bad).strip("0") == "1":
            _log.warning("%s: skipped %s in %s: %s. (%d so far)", self.where, key, shard, bad.describe(), self._bad)
        if self._bad > self.max_fraction * max(self._seen, _GRACE):
            self.stop(f"more than {self.max_fraction:.2%} of the samples are unusable")

    def counts(self) -> dict[str, dict[str, int]]:
        """Bad samples so far, over all processes and epochs: {cause: {shard: count}}."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            counts[entry["cause"]][entry["shard"]] += 1
        return {cause: dict(shards) for cause, shards in counts.items()}

    def stop(self, reason: str) -> None:
        """Raise with the reason and the counts."""
        parts = []
        for cause, shards in sorted(self.counts().items(), key=lambda item: -sum(item[1].values())):
            worst = max(shards, key=lambda shard: shards[shard])
            files = f"{len(shards):,} file{'s' * (len(shards) > 1)}"
            parts.append(f"{sum(shards.values()):,} {cause} in {files}, as {worst}")
        raise DataError(
            f"{self.where}: {reason}: {'; '.join(parts) or 'none was read'}. "
            "Clean the data (`ssmpretrain shards verify` lists what is wrong in shards), or raise max_bad_fraction."
        )


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
