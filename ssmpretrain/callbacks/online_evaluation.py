"""Evaluation of the frozen encoder during validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.features import check_has_bank, collect_features, evaluate
from ssmpretrain.training.stopping.preemption import watched


class OnlineEvaluation(Callback):
    """Evaluate the features during validation by k nearest neighbours, a linear probe and their effective rank.

    The data module provides the bank by `bank_dataloader(limit)` (training images with the transform of evaluation),
    and the queries by `val_dataloader(limit)`. No gradient reaches the encoder. Without labels only the effective rank
    is computed. The features are those that `Objective.pooled` names. `python -m ssmpretrain knn RUN --k 20 --logistic`
    computes the same numbers for the last checkpoint of a run; add `--no-ema` if the callback `EMA` averages its
    weights.

    Args:
        every_n_epochs: Evaluate at the validation of every n-th epoch and of the last epoch; at least 1.
        max_bank: Bank images over all ranks, evenly spread over the training images; at least 1.
        max_queries: Query images over all ranks, evenly spread over the validation images; at least 1.
        k: Neighbours that vote, at least 1.

    Logs:
        val/knn, val/linear_probe: Top-1 accuracy in [0, 1].
        val/effective_rank: Effective rank between 1 and the feature width. A value that falls towards 1 means collapse.
    """

    observes_only = True

    def __init__(self, every_n_epochs: int = 1, max_bank: int = 50_000, max_queries: int = 10_000, k: int = 20) -> None:
        for name, value in (
            ("every_n_epochs", every_n_epochs), ("max_bank", max_bank), ("max_queries", max_queries), ("k", k),
        ):  # fmt: skip
            if value < 1:
                raise UserError(f"OnlineEvaluation: {name} is at least 1; got {value}")
        self.every_n_epochs = every_n_epochs
        self.max_bank = max_bank
        self.max_queries = max_queries
        self.k = k

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        check_has_bank(data, "OnlineEvaluation", "Write that method, or leave the callback out.")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or ((trainer.current_epoch + 1) % self.every_n_epochs and not last):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        bank, bank_labels = self._encode(pl_module, data.bank_dataloader(limit=self.max_bank))
        queries, labels = self._encode(pl_module, data.val_dataloader(limit=self.max_queries))
        for name, value in evaluate(bank, bank_labels, queries, labels, self.k, pl_module.device).items():
            pl_module.log(f"val/{name}", value, prog_bar=name == "knn", sync_dist=True)

    def _encode(self, pl_module: LightningModule, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Compute features in the precision of the run; return features and labels of the images of all ranks."""
        with pl_module.trainer.precision_plugin.forward_context():
            encode = getattr(pl_module, "evaluated_features", pl_module)
            features, labels = collect_features(encode, watched(pl_module.trainer, batches), pl_module.device)
        parts = ranks.gather((features, labels))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
