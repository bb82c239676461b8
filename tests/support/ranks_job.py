"""Trains tiny models on one, two and four ranks and prints, as JSON, how they compare; see tests/training/test_ranks.py.

One process imports everything and forks the ranks, those of the reference run of a single process among them.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_ranks import in_ranks
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import ssmpretrain.objectives.mae
import ssmpretrain.objectives.simmim
import ssmpretrain.training.fully_sharded  # makes the strategy known
from ssmpretrain.callbacks import EMA
from ssmpretrain.encoders import load_encoder
from ssmpretrain.objectives import ARM, MAE, Finetune, LinearProbe, SimMIM
from ssmpretrain.objectives.patches import Mask, random_mask
from ssmpretrain.training.non_finite import NonFiniteGuard
from ssmpretrain.training.optimizers import AdamW
from ssmpretrain.training.schedules import Cosine

Arrays = dict[str, np.ndarray]
GLOBAL, STEPS = 8, 4  # images a step, steps
VIM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
TRAINING = {"optimizer": AdamW(lr_per_256=0.32), "schedule": Cosine(warmup_epochs=0)}  # peak lr 0.01
MODELS = {
    "MAE": lambda: MAE("test_vim", VIM, decoder_embed_dim=32, decoder_depth=1, **TRAINING),
    "MAE of a class token": lambda: MAE(
        "test_vim", {**VIM, "class_token": "middle"}, decoder_embed_dim=32, decoder_depth=1, **TRAINING
    ),
    "MAE of VMamba": lambda: MAE("test_vmamba", {}, decoder_embed_dim=32, decoder_depth=1, **TRAINING),
    "SimMIM": lambda: SimMIM("test_vmamba", **TRAINING),
    "ARM": lambda: ARM(
        "test_arm", {"patch_size": 8}, cluster_size=4, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, **TRAINING
    ),
    "Finetune": lambda: Finetune("test_vim", VIM, num_classes=4, layer_decay=0.7, **TRAINING),
    "LinearProbe": lambda: LinearProbe(
        encoder="test_vim", encoder_args=VIM, num_classes=4, learning_rates=[0.1], schedule=Cosine(warmup_epochs=0)
    ),
}
SIZES = {"MAE of VMamba": 64, "SimMIM": 64, "ARM": 64}


class Batches(LightningDataModule):
    """The same `GLOBAL` images a step for every number of ranks, each rank a part; one rank's are NaN at `bad`."""

    mean, std, classes = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ("a", "b", "c", "d")

    def __init__(self, size: int = 32, bad: int | None = None, val: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.image_size, self.bad, self.val = size, bad, val
        self.train = "made here"
        self.batch_size = GLOBAL // int(os.environ.get("WORLD_SIZE", 1))

    def num_samples(self, split: str) -> int:
        return GLOBAL * STEPS

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = []
        for step in range(STEPS):
            made = torch.Generator().manual_seed(step)
            images = torch.randn(GLOBAL, 3, self.image_size, self.image_size, generator=made)
            part = slice(rank * GLOBAL // world, (rank + 1) * GLOBAL // world)
            if step == self.bad:
                images[-1] = torch.nan
            batches.append({"image": images[part], "label": (torch.arange(GLOBAL) % 4)[part]})
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> Any:
        """As many batches as `val` says of this rank, the images numbered over the ranks."""
        rank = self.trainer.global_rank
        if not self.val:
            return []
        counts = self.val if self.trainer.world_size > 1 else (sum(self.val),)
        first = sum(counts[:rank])
        made = [torch.Generator().manual_seed(100 + number) for number in range(first, first + counts[rank])]
        batches = [
            {"image": torch.randn(2, 3, self.image_size, self.image_size, generator=one), "label": torch.arange(2)}
            for one in made
        ]
        return DataLoader(batches, batch_size=None)


class Record(Callback):
    """Keeps the norms' sum and the gradients of the first step, whole."""

    def __init__(self) -> None:
        self.gradients: Arrays = {}
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: whole(parameter.grad)
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach())))


def whole(tensor: Any) -> np.ndarray:
    """A copy of a tensor, with the rows of all ranks."""
    return np.array(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def same_masks() -> None:
    """Let each image have a mask of its own number in the global batch, whichever rank it is on."""

    def of_rank(B: int, grid: Any, mask_ratio: float, device: Any, generator: Any = None, unit: int = 1) -> Mask:
        if generator is not None:
            return random_mask(B, grid, mask_ratio, device, generator, unit)
        table = random_mask(GLOBAL, grid, mask_ratio, device, torch.Generator().manual_seed(7), unit)
        first = int(os.environ.get("RANK", 0)) * B
        return Mask(table.hidden[first : first + B], table.keep[first : first + B])

    for module in (ssmpretrain.objectives.mae, ssmpretrain.objectives.simmim):
        module.random_mask = of_rank


def train(
    name: str, strategy: str, folder: Path, bad: int | None = None, val: tuple[int, ...] = (), **options: Any
) -> dict[str, Any]:
    """Train one model and return what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    same_masks()
    seed_everything(0, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", 1))
    record, guard, ema = Record(), NonFiniteGuard(), EMA(0.5)
    clip = {} if name == "LinearProbe" else {"gradient_clip_val": 1.0}
    model = MODELS[name]()
    resumed = options.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, callbacks=[record, guard, ema], default_root_dir=folder,
        **{"max_epochs": 1, **clip, **options},
    )  # fmt: skip
    trainer.fit(model, datamodule=Batches(SIZES.get(name, 32), bad, val), ckpt_path=resumed)
    trainer.save_checkpoint(folder / f"{strategy}{world}.ckpt")
    return {
        "gradients": record.gradients,
        "losses": record.losses,
        "skipped": guard.skipped,
        "weights": {key: whole(value) for key, value in model.state_dict().items()},  # the average
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def distance(ours: Arrays, theirs: Arrays) -> float:
    """Norm of the difference over the norm, the largest over the tensors; infinite where names differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    scale = max(float(np.linalg.norm(theirs[name])) for name in theirs)
    return max(float(np.linalg.norm(ours[name] - theirs[name])) for name in ours) / scale


def compared(results: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """How a job's ranks compare with the single process, and with one another."""
    return {
        "gradients": max(distance(one["gradients"], alone["gradients"]) for one in results),
        "losses": max(abs(a - b) for one in results for a, b in zip(one["losses"], alone["losses"], strict=True)),
        "weights": max(distance(one["weights"], alone["weights"]) for one in results),
        "among ranks": max(distance(one["weights"], results[0]["weights"]) for one in results),
        "skipped": [one["skipped"] for one in results],
        "metrics": [one["metrics"] for one in (*results, alone)],
    }


def ddp(folder: Path) -> dict[str, Any]:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"  # names parameters without a gradient, and checks the collectives
    report = {}
    for name in MODELS:
        (alone,) = in_ranks(1, train, name, "auto", folder)
        worlds = (2, 4) if name in ("MAE", "SimMIM", "Finetune") else (2,)
        report[name] = {str(world): compared(in_ranks(world, train, name, "ddp", folder), alone) for world in worlds}
    (alone,) = in_ranks(1, train, "MAE", "auto", folder, 2)
    report["NaN on one rank"] = {"2": compared(in_ranks(2, train, "MAE", "ddp", folder, 2), alone)}
    return report


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("REPORT", json.dumps({"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](Path(folder))))


def fsdp(folder: Path) -> dict[str, Any]:
    load_encoder
    return {}


if __name__ == "__main__":
    main()
