"""A list of every sample that a run trained on, to prove that no sample is missing or repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.json_lines import RowFile, drop_rows


class SampleLog(Callback):
    """Write the keys of every trained batch to `samples-rank0.jsonl`, `samples-rank1.jsonl`, ... in the run's folder.

    Each row stands for one batch: the optimizer step it belongs to (from 0, as in `metrics.jsonl`), the epoch, the
    number of the batch in the epoch, and the keys of the samples. A continued run first drops the rows after its
    checkpoint, because it trains these samples again. So the files list exactly the samples that the weights have seen.
    Rows are written at once and survive a kill.

    Raises:
        ValueError: If batches have no "key".
    """

    observes_only = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        for path in folder.glob("samples-rank*.jsonl") if trainer.is_global_zero else ():
            drop_rows(path, trainer.global_step)  # also files of ranks that no longer exist
        trainer.strategy.barrier("samples")
        self._rows = RowFile(folder / f"samples-rank{trainer.global_rank}.jsonl")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if "key" not in batch:
            got = ", ".join(batch)
            raise UserError(f"SampleLog: batches have the samples' keys as 'key'; got {got}. Leave the callback out.")
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = {"step": self._step, "epoch": trainer.current_epoch, "batch": batch_idx, "keys": list(batch["key"])}
        self._rows.append([json.dumps(row)])
