"""An interrupted run equals an uninterrupted one bit for bit, and trains each sample equally often."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.objectives import CLIP, MAE, Finetune
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine


class Killed(Exception):
    """Stand-in for SIGKILL: no code saves or cleans up after it."""


class Record(Callback):
    """Record losses and keys by (epoch, batch); save and die after a number of optimizer steps."""

    def __init__(self, folder: Path, die_after: int | None) -> None:
        self.folder, self.die_after = folder, die_after
        self.losses: dict[tuple[int, int], float] = {}
        self.keys: dict[tuple[int, int], list[str]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.losses[trainer.current_epoch, i] = float(outputs["loss"])
        self.keys[trainer.current_epoch, i] = batch["key"]
        if trainer.global_step == self.die_after and (i + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / "stopped.ckpt")
            raise Killed


class Captioned(CLIP):
    """An image's caption is its key."""

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return super().on_before_batch_transfer({**batch, "text": batch["key"]}, dataloader_idx)


def objective(name: str) -> LightningModule:
    torch.manual_seed(0)
    encoder: dict[str, Any] = {
        "encoder": "test_vim",
        "encoder_args": {"img_size": 16, "patch_size": 4, "drop_path_rate": 0.5},
    }
    common: dict[str, Any] = {"optimizer": AdamW(lr_per_256=1e-1), "schedule": Cosine(warmup_epochs=1)}
    if name == "MAE":
        return MAE(**encoder, decoder_embed_dim=16, **common)
    if name == "CLIP":
        text = TextTower(width=16, heads=2, layers=1, context_length=8)
        return Captioned(**encoder, text=text, embed_dim=16, mask_ratio=0.5, **common)
    return Finetune(**encoder, num_classes=10, mixup=0.8, cutmix=1.0, **common)


def train(
    folder: Path, kind: str, *, die_after: int | None = None, resume: bool = False, workers: int = 0, **data: Any
) -> tuple[Record, dict[str, torch.Tensor]]:
    model, record = objective(kind), Record(folder, die_after)
    accumulate = data.pop("accumulate", 2)
    options: dict[str, Any] = {"batch_size": 4, "image_size": 16, "shuffle_buffer": 8, "repeats": 2, **data}
    images = ImageShards(
        f"{folder}/train-*.tar", f"{folder}/train-000001.tar", num_workers=workers, random_erasing=0.5, **options
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, accumulate_grad_batches=accumulate, callbacks=[EMA(0.5), record], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.validate(model, images, verbose=False)  # draws random numbers that must not matter
    try:
        path = str(folder / "stopped.ckpt") if resume else None
        trainer.fit(model, images, ckpt_path=path, weights_only=True)
    except Killed:
        pass
    return record, model.state_dict()


@pytest.fixture
def folder(make_shards: Any) -> Path:
    return make_shards([11, 4, 20, 7])  # 42 samples: 10 batches of 4, five steps an epoch


def merged(records: list[Record], name: str) -> dict[tuple[int, int], Any]:
    """Join the records of the parts of a run; no batch may occur twice."""
    together: dict[tuple[int, int], Any] = {}
    for record in records:
        assert not set(together) & set(getattr(record, name))
        together |= getattr(record, name)
    return together


@pytest.mark.parametrize(
    ("kind", "deaths"),
    [("MAE", [2, 3]), ("MAE", [5, 11]), ("Finetune", [7, 8]), pytest.param("CLIP", [5, 7], marks=pytest.mark.slow)],
)
def test_stopped_twice_and_continued_with_other_workers_is_equal_to_the_last_bit(
    kind: str, deaths: list[int], folder: Path
) -> None:
    whole, expected = train(folder, kind)
    parts = [
        train(folder, kind, die_after=deaths[0])[0],
        train(folder, kind, die_after=deaths[1], resume=True, workers=2)[0],
    ]
    last, weights = train(folder, kind, resume=True, workers=1)
    assert len(whole.losses) == 30
    assert merged([*parts, last], "losses") == whole.losses
    assert merged([*parts, last], "keys") == whole.keys
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("then", [{"batch_size": 8, "accumulate": 1}, {"batch_size": 2, "accumulate": 4}])
def test_other_batches_of_the_same_step_go_on_with_what_is_left(then: dict[str, int], folder: Path) -> None:
    whole, _ = train(folder, "MAE", repeats=1)
    first, _ = train(folder, "MAE", die_after=7, repeats=1)
    rest, _ = train(folder, "MAE", resume=True, repeats=1, **then)
    assert min(rest.losses) == (1, 2 * then["accumulate"]) and len(rest.losses) == 8 * then["accumulate"]

    def counts(record: Record, epoch: int) -> Counter[str]:
        return Counter(key for (number, _), keys in record.keys.items() if number == epoch for key in keys)

    assert counts(first, 1) + counts(rest, 1) == counts(whole, 1)
    assert counts(rest, 2) == counts(whole, 2)


class Plateau(MAE):
    """Steps its scheduler by the epoch, as `val/loss` says."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def test_a_scheduler_that_waits_for_the_end_of_the_epoch_misses_no_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "MAE", Plateau)
    whole, expected = train(folder, "MAE")
    first, _ = train(folder, "MAE", die_after=3)
    rest, weights = train(folder, "MAE", resume=True)
    assert merged([first, rest], "losses") == whole.losses
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_changed_seed_everything_is_not_overruled_by_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    for named, kept in (("5", None), ("6", 3), (None, 3)):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if named is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", named)
        resume = ExactResume()
        resume.load_state_dict({"seed": 3})
        assert resume.state_dict() == {"seed": kept}
