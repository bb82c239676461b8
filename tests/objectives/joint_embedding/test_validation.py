"""A validation of an objective of views: no loss, one batch, and features that `OnlineEvaluation` evaluates."""

from typing import Any

import pytest
import torch
from dino_run import ManyViews, fit, tiny_dino
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.callbacks import OnlineEvaluation
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.evaluation.features import effective_rank


class Validated(ManyViews):
    """Views for training, and three batches of eight whole images for a validation, with labels or without."""

    def __init__(self, has_labels: bool) -> None:
        super().__init__()
        self.has_labels = has_labels

    def images(self, seed: int) -> list[dict[str, Tensor]]:
        drawn = torch.Generator().manual_seed(seed)
        label = torch.arange(8) % 2 if self.has_labels else torch.full((8,), -1)
        return [{"image": torch.randn(8, 3, 32, 32, generator=drawn), "label": label} for _ in range(3)]

    def val_dataloader(self, limit: int | None = None) -> DataLoader[Any]:
        return DataLoader(self.images(1), batch_size=None)  # type: ignore[arg-type]

    def bank_dataloader(self, limit: int | None = None) -> DataLoader[Any]:
        return DataLoader(self.images(2), batch_size=None)  # type: ignore[arg-type]


class Results(Callback):
    """Counts the batches of validations, and keeps what they logged."""

    def __init__(self) -> None:
        self.batches, self.logged = 0, dict[str, float]()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.logged = {name: value.item() for name, value in metrics if name.startswith("val/")}


@pytest.mark.parametrize("has_labels", [True, False])
def test_the_teachers_features_are_evaluated_and_the_loop_reads_one_batch(has_labels: bool) -> None:
    model, data, results = tiny_dino(), Validated(has_labels), Results()
    fit(model, data, OnlineEvaluation(k=3), results, limit_val_batches=1.0, num_sanity_val_steps=0)
    names = {"val/effective_rank"} | ({"val/knn", "val/linear_probe"} if has_labels else set())
    assert results.logged.keys() == names and results.batches == 1
    with torch.no_grad():
        ranks = [
            effective_rank(torch.cat([encode(encoder, batch["image"]).vector for batch in data.images(1)]))
            for encoder in (model.teacher.encoder, model.encoder.eval())
        ]
    assert results.logged["val/effective_rank"] == pytest.approx(ranks[0], rel=1e-4)
    assert results.logged["val/effective_rank"] != pytest.approx(ranks[1], rel=1e-4)


def test_no_batch_is_read_if_the_recipe_has_no_validation() -> None:
    results = Results()
    fit(tiny_dino(), Validated(has_labels=True), OnlineEvaluation(k=3), results, limit_val_batches=0)
    assert results.batches == 0 and not results.logged
