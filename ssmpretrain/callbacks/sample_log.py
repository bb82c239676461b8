"""A list of every sample that a run trained, to prove that none is missing and none came twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.json_lines import RowFile, drop_rows


class SampleLog(Callback):
    """Write the keys of every trained batch to `samples-rank0.jsonl`, `samples-rank1.jsonl`, ... in the run's folder.

    One row a batch: the optimizer step that it goes into, counted from 0 as in `metrics.jsonl`, the epoch, the batch in
    that epoch, and the samples' keys. A continued run first drops the rows later than its checkpoint, as these samples
    are trained again: so the files hold what the weights have seen, each time that they have. Written at once, they
    survive a kill.

    Raises:
        ValueError: If batches have no "key".
    """

    observes_only = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        for path in folder.glob("samples-rank*.jsonl") if trainer.is_global_zero else ():
            drop_rows(path, trainer.global_step)  # also of ranks that are no more
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
