"""A tiny objective with a teacher, and the data of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.objectives.joint_embedding import Taught
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine, Schedule

VIM: dict[str, Any] = {"depth": 2, "patch_size": 8, "drop_path_rate": 0.5}


class Twin(Taught):
    """Pull the projections of the student towards those of the teacher, of the same two views."""

    def __init__(
        self,
        encoder: str | None = "test_vim",
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        momentum: Ramp = Ramp(0.5, 1.0),  # noqa: B008  (read only)
        temperature: Ramp = Ramp(0.04, 0.07, "linear", epochs=1),  # noqa: B008
        clip_per_tensor: float | None = None,
        optimizer: AdamW = AdamW(lr_per_256=1.0),  # noqa: B008
        schedule: Schedule = Cosine(warmup_epochs=1),  # noqa: B008
    ) -> None:
        args = {**VIM, **(encoder_args or {})} if encoder == "test_vim" else encoder_args
        super().__init__(
            encoder, args, optimizer, schedule, init_from=init_from, momentum=momentum, temperature=temperature,
            clip_per_tensor=clip_per_tensor,
        )  # fmt: skip
        width = self.encoder.num_features
        self.head = nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))
        self.momentum, self.temperature, self.clip_per_tensor = momentum, temperature, clip_per_tensor
        self.build_teacher()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["views"][0].flatten(0, 1)
        targets = self.teacher.head(self.teacher(images).vector)
        error = (self.head(encode(self.encoder, images).vector) - targets.roll(1, 0)).square().mean()
        loss = error / self.value_of(self.temperature)
        self.log("train/loss", loss)
        return loss


class TwoViews(LightningDataModule):
    """Two noise images a batch and two views of each; `count` batches an epoch on each rank."""

    mean, std, batch_size, views = [0.5] * 3, [0.5] * 3, 2, ("two",)

    def __init__(self, count: int = 4, size: int = 16) -> None:
        super().__init__()
        self.count, self.image_size, self.start = count, size, 0

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        rank, world = trainer.global_rank, trainer.world_size
        noise = torch.Generator().manual_seed(0)
        views = torch.randn(self.count * world, 2, 2, 3, self.image_size, self.image_size, generator=noise)[rank::world]
        return DataLoader(Rest([{"views": [one], "num_global": 2} for one in views], self), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        return {"start": trainer.fit_loop.epoch_loop.batch_progress.current.processed % self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


class Rest(Dataset[Any]):
    """Batches of an epoch; of the first epoch those from `start` of the data module on, which a checkpoint sets."""

    def __init__(self, batches: list[Any], data: TwoViews) -> None:
        self.batches, self.data, self.taken = batches, data, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        self.taken += 1
        return self.batches[(self.data.start + self.taken - 1) % len(self)]


def fit(
    folder: Path, model: Any, *callbacks: Callback, data: Any = None, resume: Any = None, **options: Any
) -> Trainer:
    """Train for two epochs on one CPU; returns the trainer."""
    trainer = Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
        **{"max_epochs": 2, "limit_val_batches": 0, **options},
    )  # fmt: skip
    trainer.fit(model, data or TwoViews(), ckpt_path=resume, weights_only=True)
    return trainer
