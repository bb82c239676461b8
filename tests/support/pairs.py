"""Image-caption pairs made on the spot, the same for every number of ranks, and a short run of them."""

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

VIM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
TEXT = TextTower(width=32, heads=2, layers=2, context_length=12)
TRAINING: dict[str, Any] = {"optimizer": AdamW(lr_per_256=0.32), "schedule": Cosine(warmup_epochs=0)}  # peak lr 0.01
COLOURS, THINGS = ("red", "green", "blue", "grey"), ("circle", "square", "star", "cross")


class Pairs(LightningDataModule):
    """Steps of `per_step` pairs, each rank a part of them, in batches of `batch_size`.

    Args:
        batch_size: Pairs of a rank in one batch.
        per_step: Pairs of all ranks in one optimizer step.
        steps: Optimizer steps of an epoch.
        size: Pixels along the side of an image.
        uneven: Pairs that the last rank lacks in each batch.
    """

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    tokenizer: Any = None
    train = "made here"

    def __init__(
        self,
        batch_size: int = 8,
        per_step: int = 8,
        steps: int = 3,
        size: int = 32,
        uneven: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.per_step, self.steps, self.image_size = batch_size, per_step, steps, size
        self.uneven = uneven

    def num_samples(self, split: str) -> int:
        return self.per_step * self.steps

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        batches = []
        for step in range(self.steps):
            count = self.per_step
            images, texts = pairs_of_step(step, count, self.image_size)
            ours = list(range(rank * count // world, (rank + 1) * count // world))
            for start in range(0, len(ours), self.batch_size):
                chosen = ours[start : start + self.batch_size - self.uneven * (rank == world - 1)]
                batches.append(self._batch(images[chosen], [texts[number] for number in chosen]))
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        images, texts = pairs_of_step(1000, self.per_step, self.image_size)
        return DataLoader([self._batch(images, texts)], batch_size=None)

    def _batch(self, images: torch.Tensor, texts: list[str]) -> dict[str, Any]:
        batch: dict[str, Any] = {"image": images, "label": torch.full((len(images),), -1), "text": texts}
        batch |= {"owner": torch.arange(len(texts)), "key": [str(number) for number in range(len(texts))]}
        if self.tokenizer is not None:
            batch["tokens"], batch["cut"] = self.tokenizer(texts)
        return batch


def pairs_of_step(step: int, count: int, size: int) -> tuple[torch.Tensor, list[str]]:
    """Images (count, 3, size, size) and a caption of each."""
    drawn = torch.Generator().manual_seed(step)
    images = torch.randn(count, 3, size, size, generator=drawn)
    return images, [f"{step} {COLOURS[i % 4]} {THINGS[i // 4 % 4]}s" for i in range(count)]


def tiny(cls: type[Any], **changes: Any) -> Any:
    """A CLIP or MAECLIP of a small Vim and a small Transformer, the same each time."""
    torch.manual_seed(0)
    return cls(**{"encoder": "test_vim", "encoder_args": VIM, "text": TEXT, "embed_dim": 16, **TRAINING, **changes})


class Gradients(Callback):
    """Keeps the gradients of every optimizer step, whole, and the losses that were logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: whole(p.grad).clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if len(self.losses) < len(self.steps):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def whole(tensor: Any) -> torch.Tensor:
    """A tensor with the rows of all ranks."""
    whole: torch.Tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    return whole


def fit(model: LightningModule, data: Pairs, *callbacks: Callback, **options: Any) -> Gradients:
    """Train a model and return what its steps were."""
    record = Gradients()
    quiet = {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    settings = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "limit_val_batches": 0, **quiet, **options}
    trainer = Trainer(**{"num_sanity_val_steps": 0, **settings}, callbacks=[record, *callbacks])
    trainer.fit(model, data)
    return record


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Norm of the difference over the norm of the largest, the largest of it; infinite where names differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    ours, theirs = ({name: torch.as_tensor(value) for name, value in one.items()} for one in (ours, theirs))
    scale = max(float(value.norm()) for value in theirs.values())
    return max(float((ours[name] - value).norm()) for name, value in theirs.items()) / scale
