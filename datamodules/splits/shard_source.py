"""Settings by which a data module reads shards: their cache, their order, and the lists of classes beside them."""

from dataclasses import dataclass, field
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.plan import MOST_SAMPLES
from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
from ssmpretrain.datamodules.remote.server import is_remote


@dataclass
class ShardSource:
    """Settings that all data modules of shards share; `ImageShards` documents them.

    Args:
        where: Name of the data module, which opens every message.
        shuffle_buffer, cache, cache_limit, storage_options: As in `ImageShards`.

    Attributes:
        absent: Errors that mean that the shards of a split are missing.

    Raises:
        DataError: If an argument is out of range.
    """

    where: str
    shuffle_buffer: int
    cache: str | None
    cache_limit: str | None
    storage_options: dict[str, Any] | None
    absent: tuple[type[Exception], ...] = (OSError, DataError)
    _labels_of_folder: dict[str, Labels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.shuffle_buffer <= MOST_SAMPLES:
            raise DataError(
                f"{self.where}: shuffle_buffer is from 1 to {MOST_SAMPLES:,}; got {self.shuffle_buffer}. Use 5000, say."
            )

    def arguments(self, pattern: str | list[str], split: str, max_bad_fraction: float) -> dict[str, Any]:
        """Return the arguments of `ShardSplit` for the shards of one split, "train" or "val"."""
        return {
            "pattern": pattern,
            "where": f"{self.where}: {split}",
            "cache": self._shard_cache(pattern),
            "max_bad_fraction": max_bad_fraction,
            "labels_of_folder": self._labels_of_folder,
        }

    def _shard_cache(self, pattern: str | list[str]) -> ShardCache | None:
        """Return the cache for copies of shards on servers; None if all are local."""
        patterns = [pattern] if isinstance(pattern, str) else pattern
        if not any(is_remote(str(text)) for text in patterns):
            return None
        return make_cache(self.where, self.cache, self.cache_limit, self.storage_options)
