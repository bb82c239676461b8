"""Batches of an epoch: the epoch decides the augmentation of a sample."""

from collections.abc import Sequence
from typing import Any, cast

from ssmpretrain.datamodules.faults.bad_samples import BadSamples
from ssmpretrain.datamodules.labels.classes import UNLABELLED
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import BatchKey
from ssmpretrain.datamodules.order.plan import Order, Stage


class Notes:
    """A batcher that notes what would decide the augmentation, and draws nothing."""

    def decode(self, raw: dict[str, Any], labels: Any) -> dict[str, Any]:
        return {"label": 0}

    def prepare(self, decoded: dict[str, Any], epoch: int, sample: str, copy: int = 0) -> tuple[int, str, int]:
        return epoch, sample, copy

    def collate(self, batch: Sequence[Any]) -> list[Any]:
        return list(batch)


class Numbers(PlannedBatches):
    def read(self, shard: int, sample: int) -> Any:
        return {"__key__": f"{shard}/{sample}"}

    def labels_of(self, shard: int) -> Any:
        return UNLABELLED

    def source(self, shard: int) -> tuple[str, int]:
        return f"{shard}.tar", int(self.sizes[shard])


def test_each_epoch_augments_every_sample_by_its_own_number() -> None:
    batches = Numbers([3, 5], cast(Any, Notes()), order=Order(repeats=2), bad=BadSamples("data", 0.5))
    for epoch in (0, 3):
        batch: Any = batches[BatchKey(epoch, 0, 0, (Stage(batch_size=6),))]
        samples = {sample for _, sample, _ in batch}
        assert len(samples) == 3
        assert sorted(batch) == sorted((epoch, sample, copy) for sample in samples for copy in (0, 1))
