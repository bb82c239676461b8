"""A tiny run of CLIP."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from ssmpretrain.objectives import CLIP
from ssmpretrain.objectives.contrastive.text_tower import TextTower


class Pairs(LightningDataModule):
    """One batch of three noise images, 32 x 48 pixels, with captions."""

    image_size, mean, std = (32, 48), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    batch_size, interpolation, eval_crop_ratio = 3, "bilinear", 0.9

    def train_dataloader(self) -> DataLoader[Any]:
        noise = torch.randn(3, 3, *self.image_size, generator=torch.Generator().manual_seed(0))
        return DataLoader([{"image": noise, "text": ["a cat", "两只狗 🐕", ""]}], batch_size=None)


def tiny_clip(**changes: Any) -> CLIP:
    """A CLIP small enough for tests; its Vim has patches of 8 x 8 pixels."""
    torch.manual_seed(0)
    text = TextTower(**{"width": 32, "heads": 4, "layers": 2, "context_length": 16, **changes.pop("text", {})})
    return CLIP(**{"encoder": "test_vim", "encoder_args": {"patch_size": 8}, "text": text, "embed_dim": 24, **changes})


def fit_one_step(folder: Path, model: CLIP) -> Path:
    """What `fit` leaves of one step in a run folder."""
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, Pairs())
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder
