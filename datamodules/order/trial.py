"""Trial of a few samples before any worker starts, so that unusable data give one clear error."""

from collections import Counter

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSample, count_by_cause, summarise
from ssmpretrain.datamodules.labels.labelled_sets import LabelledSets
from ssmpretrain.datamodules.order.batches import PlannedBatches

_TRIED = 16


def try_some(batches: PlannedBatches, where: str, split: str, labels: LabelledSets) -> None:
    """Decode up to 16 samples, spread over the data, until one can be used.

    Args:
        batches: The batches to try.
        where: Name of the data module, which opens every message.
        split: "train" or "val", used in messages.
        labels: Records a warning if the label of the good sample cannot be read.

    Raises:
        DataError: If no sample can be used. The message names the most frequent cause and one sample.
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
