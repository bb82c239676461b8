"""A tiny DINO, and data that give views of noise images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.objectives import DINO
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine

VIM: dict[str, Any] = {"depth": 2, "patch_size": 8, "img_size": 32}
TINY: dict[str, Any] = {
    "num_prototypes": 24, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "freeze_last_layer_epochs": 0,
    "teacher_temperature": Ramp(0.04, 0.07, "linear", 1), "clip_per_tensor": None,
    "optimizer": AdamW(lr_per_256=0.32, eps=1e-6), "schedule": Cosine(warmup_epochs=0),
}  # fmt: skip


class ManyViews(LightningDataModule):
    """Batches of noise images, each with two global views and, unless `local` is 0, three local ones.

    Args:
        size: Side of the global views.
        local: Side of the local views.
        batch_size: Images of a batch.
        count: Batches of an epoch.
    """

    mean, std, train = [0.5] * 3, [0.25] * 3, "made here"

    def __init__(self, size: int = 32, local: int = 16, batch_size: int = 4, count: int = 2) -> None:
        super().__init__()
        self.image_size, self.batch_size, self.count = size, batch_size, count
        self.groups = [(2, size), (3, local)] if local else [(2, size)]
        self.views = [SimpleNamespace(size=side) for _, side in self.groups]

    def num_samples(self, split: str) -> int:
        return self.batch_size * self.count

    def batch(self, number: int = 0) -> dict[str, Any]:
        noise = torch.Generator().manual_seed(number)
        of_size: dict[int, list[Tensor]] = {}
        for count, side in self.groups:
            views = torch.randn(self.batch_size, count, 3, side, side, generator=noise)
            of_size.setdefault(side, []).append(views)
        return {"views": [torch.cat(views, dim=1) for views in of_size.values()], "num_global": 2}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch(number) for number in range(self.count)], batch_size=None)


def tiny_dino(encoder: str = "test_vim", encoder_args: dict[str, Any] | None = None, **changes: Any) -> DINO:
    torch.manual_seed(0)
    args = VIM if encoder == "test_vim" and encoder_args is None else encoder_args
    return DINO(**{"encoder": encoder, "encoder_args": args, **TINY, **changes})


def fit(
    model: LightningModule, data: Any = None, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Trainer:
    """Train for an epoch on one CPU; returns the trainer."""
    trainer = Trainer(**{
        "accelerator": "cpu", "callbacks": list(callbacks), "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_val_batches": 0, "enable_checkpointing": False, "max_epochs": 1,
        **options,
    })  # fmt: skip
    trainer.fit(model, data or ManyViews(), ckpt_path=resume, weights_only=True)
    return trainer
