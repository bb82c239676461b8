"""A few samples tried before any worker starts, so that data of which none can be used fail in one message."""

from collections import Counter

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSample, count_by_cause, summarise
from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets
from ssmpretrain.datamodules.order.batches import PlannedBatches

_TRIED = 16


def try_some(batches: PlannedBatches, where: str, split: str, labels: LabelledSets) -> None:
    """Decode a few samples until one is good, spread over the data.

    Args:
        batches: What is to be read.
        where: Opens every message.
        split: Of the data, "train" or "val".
        labels: Is told of the good sample, whose label may be unreadable.

    Raises:
        DataError: If none of them can be used; names the most frequent cause and one sample.
    """
    found: list[BadRecord] = []
    for shard, sample in batches.spread(_TRIED):
        key = f"sample {sample}"
        try:
            raw = batches.read(shard, sample)
            key = raw["__key__"]
            reader = batches.labels_of(shard)
            batches.batcher.decode(raw, reader)
            labels.say_of(reader, raw, f"{split}: {key} in {batches.source(shard)[0]}")
            return
        except BadSample as bad:
            source = batches.source(shard)[0]
            found.append(BadRecord(0, bad.cause, source, sample, bad.key or key, bad.describe()))
    causes = Counter(record.cause for record in found)
    first = next(record for record in found if record.cause == causes.most_common(1)[0][0])
    raise DataError(
        f"{where}: {split}: none of {len(found)} samples tried can be used: {summarise(count_by_cause(found))}; "
        f"such as {first.key} in {first.shard}: {first.detail}. Check the data."
    )
