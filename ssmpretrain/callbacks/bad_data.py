"""Bad samples of a run: counted over all ranks, logged every epoch, and listed in the run folder."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.json_lines import Row, RowFile, mend_rows, read_rows
from ssmpretrain.base.ranks import gather, rank
from ssmpretrain.base.run_folder import RunFolder

_log = logging.getLogger(__name__)


class BadData(Callback):
    """Report skipped samples at the end of each epoch, and list all of them in `bad_samples.jsonl` of the run folder.

    The data module offers up to four methods. Without `bad_records` the callback does nothing:

    - `bad_records()` returns the bad samples that this rank found. Each is a plain dict with at least split ("train",
      "val" or another name), epoch, cause and shard. The same sample always gives the same dict.
    - `samples_per_epoch(split)` returns the number of samples that all ranks read in an epoch.
    - `check_bad(split, bad, samples)` raises if there are too many bad samples.
    - `dropped_records()` returns the objects that this rank left out of the annotations of usable images, as the same
      kind of dict. They are listed and logged, and are no bad samples. It may be missing.

    The list is for people; the counts do not come from it. The count of an epoch covers the samples found since the
    process began, and those found before the checkpoint that the run continues from. A sample that is read again counts
    once. `check_bad` gets only the samples found since the process began, so a run can continue once its data are
    repaired.

    Logs:
        data/bad_samples: Skipped training samples of the epoch, over all ranks.
        data/bad_samples/undecodable_images: Skipped training samples with this cause; other causes likewise. Logged
            only if there are any.
        data/bad_val_samples: Skipped validation samples. Logged only if there are any.
        data/dropped_objects: Objects left out of the annotations of training images, since the process began, over all
            ranks. Logged only if there are any. data/dropped_objects/unknown_category: Those with this cause; other
            causes likewise.
    """

    observes_only = True

    def __init__(self) -> None:
        self._listed: set[str] | None = None  # lines of the list, on rank 0
        self._num_objects = 0  # dropped objects that were told
        self._trained: list[Row] = []  # bad samples of all ranks before the checkpoint that the run continues from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            mend_rows(_path(trainer), is_row=_is_record)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(_data(trainer), "bad_records"):
            return
        bad, met = self._of_epoch(trainer, "train")
        causes = Counter(record["cause"] for record in bad)
        values = {f"data/bad_samples/{cause.replace(' ', '_')}": float(count) for cause, count in causes.items()}
        pl_module.log_dict({"data/bad_samples": float(len(bad)), **values})
        self._tell_objects(trainer, pl_module)
        _tell(trainer, "train", bad, met)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not hasattr(_data(trainer), "bad_records"):
            return
        bad, met = self._of_epoch(trainer, "val")
        if bad:
            pl_module.log("data/bad_val_samples", float(len(bad)))
            _tell(trainer, "val", bad, met)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the bad samples of this epoch, because a continued run does not read earlier samples again."""
        rows = self._with_trained(trainer, self._gather(trainer))
        lines = [json.dumps(row) for row in rows if row["split"] == "train"]
        if lines:
            checkpoint["callbacks"][self.state_key] = {"trained": lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained = [json.loads(line) for line in state_dict["trained"]]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """List the bad samples of this rank, without waiting for the others."""
        if (records := _records(trainer)) and trainer.state.fn == "fit":
            self._list(trainer, records)
            if isinstance(exception, ValueError):
                _log.error("%s: lists the %s bad samples so far.", _path(trainer), f"{len(records):,}")

    def _tell_objects(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List the dropped objects of all ranks; log those of training, and how many there are if that is new."""
        if not hasattr(_data(trainer), "dropped_records"):
            return
        rows = {json.dumps(row): row for part in gather(_data(trainer).dropped_records()) for row in part}
        causes = Counter(row["cause"] for row in rows.values() if row["split"] == "train")
        if causes:
            values = {f"data/dropped_objects/{cause.replace(' ', '_')}": float(n) for cause, n in causes.items()}
            pl_module.log_dict({"data/dropped_objects": float(causes.total()), **values})
        if trainer.is_global_zero and len(rows) > self._num_objects:
            self._num_objects = len(rows)
            self._list(trainer, list(rows.values()))
            _log.warning("%s: lists the %s dropped objects so far.", _path(trainer), f"{len(rows):,}")

    def _of_epoch(self, trainer: Trainer, split: str) -> tuple[list[Row], int]:
        """Return the bad samples of the epoch on all ranks, and the number of those found since the process began."""
        met = self._gather(trainer)
        found, since = (
            [record for record in rows if (record["split"], record["epoch"]) == (split, trainer.current_epoch)]
            for rows in (self._with_trained(trainer, met), met.values())
        )
        return found, len(since)

    def _gather(self, trainer: Trainer) -> dict[str, Row]:
        """Gather the bad samples of this and later epochs from all ranks, and list them on rank 0."""
        mine = [record for record in _records(trainer) if record["epoch"] >= trainer.current_epoch]
        met = {json.dumps(record): record for part in gather(mine) for record in part}
        if rank() == 0 and trainer.state.fn == "fit":
            self._list(trainer, list(met.values()))
        return met

    def _with_trained(self, trainer: Trainer, met: dict[str, Row]) -> list[Row]:
        """Return the samples `met`, and those found in this epoch before the checkpoint, each once."""
        trained = {json.dumps(row): row for row in self._trained if row["epoch"] >= trainer.current_epoch}
        return list({**trained, **met}.values())

    def _list(self, trainer: Trainer, records: list[Row]) -> None:
        """Append the records that the file does not hold yet."""
        if self._listed is None:
            self._rows = RowFile(_path(trainer))
            self._listed = {json.dumps(record) for record in read_rows(self._rows.path, _is_record)}
        fresh = {line: record for record in records if (line := json.dumps(record)) not in self._listed}
        self._listed.update(fresh)
        self._rows.append(fresh)


def _is_record(row: Row) -> bool:
    kinds = {"split": str, "epoch": int, "cause": str, "shard": str}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def describe(records: list[Row]) -> str:
    """Describe bad samples by cause, such as "10 undecodable images in 4 files, most in train-000017.tar"."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record["cause"]][os.path.basename(record["shard"])] += 1
    parts = []
    for cause, shards in sorted(counts.items(), key=lambda item: -item[1].total()):
        worst = shards.most_common(1)[0][0]
        where = f"in {worst}" if len(shards) == 1 else f"in {len(shards):,} files, most in {worst}"
        of_shards = "samples of " if cause.endswith("shards") else ""
        parts.append(f"{shards.total():,} {of_shards}{cause} {where}")
    return "; ".join(parts)


def _tell(trainer: Trainer, split: str, bad: list[Row], met: int) -> None:
    """Log the bad samples, and let the data module check the number of those `met` since the process began."""
    data = _data(trainer)
    samples = data.samples_per_epoch(split) if hasattr(data, "samples_per_epoch") else 0
    if bad and trainer.is_global_zero:
        what, of = ("validation: " if split == "val" else ""), (f"of {samples:,} " if samples else "")
        _log.warning(
            "epoch %d: %sskipped %s %ssamples: %s", trainer.current_epoch + 1, what, f"{len(bad):,}", of, describe(bad)
        )
    if hasattr(data, "check_bad"):
        data.check_bad(split, met, samples)


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _records(trainer: Trainer) -> list[Row]:
    data = _data(trainer)
    return data.bad_records() if hasattr(data, "bad_records") else []


def _path(trainer: Trainer) -> Path:
    return RunFolder(trainer.default_root_dir).bad_samples
