"""A tiny objective with a teacher, and the data of its runs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.objectives.joint_embedding import Taught
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine, Schedule

VIM: dict[str, Any] = {"depth": 2, "patch_size": 8, "img_size": 16, "drop_path_rate": 0.5}


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
    """Batches of two noise images of 16 x 16 pixels, two views of each; `count` batches an epoch."""

    image_size, mean, std, batch_size, views = 16, [0.5] * 3, [0.5] * 3, 2, ("two",)

    def __init__(self, count: int = 4, size: int = 16) -> None:
        super().__init__()
        self.count, self.image_size = count, size

    def train_dataloader(self) -> DataLoader[Any]:
        noise = torch.randn(
            self.count, 2, 2, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0)
        )
        return DataLoader([{"views": [views], "num_global": 2} for views in noise], batch_size=None)


def fit(
    folder: Path, model: Any, *callbacks: Callback, data: Any = None, resume: Any = None, **options: Any
) -> Trainer:
    """Train for two epochs on one CPU; returns the trainer."""
    trainer = Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(model, data or TwoViews(), ckpt_path=resume, weights_only=True)
    return trainer
