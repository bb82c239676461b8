"""Trains tiny models on one, two and four ranks and prints, as JSON, how they compare; what test_ranks.py starts.

One process imports everything and forks the ranks, those of the reference run of a single process among them.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import ssmpretrain.objectives.contrastive.clip
import ssmpretrain.objectives.masked.mae
import ssmpretrain.objectives.masked.simmim
from ssmpretrain.callbacks import EMA
from ssmpretrain.objectives import ARM, DINO, MAE, Finetune, LinearProbe, SimMIM
from ssmpretrain.objectives.joint_embedding.gram import Gram
from ssmpretrain.objectives.joint_embedding.losses import sinkhorn_knopp
from ssmpretrain.objectives.joint_embedding.masks import Drawn, Masks
from ssmpretrain.objectives.masked.patches import Mask, random_mask
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine
from ssmpretrain.training.ranks.fsdp import FSDP2
from ssmpretrain.training.ranks.sharded_tensors import local
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard

Arrays = dict[str, np.ndarray]
GLOBAL, STEPS = 8, 4  # images a step, steps
VIM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
# Peak lr 0.01. eps is far above the rounding of a gradient, 4e-8, which AdamW would blow up to a step where it is all.
TRAINING = {"optimizer": AdamW(lr_per_256=0.32, eps=1e-6), "schedule": Cosine(warmup_epochs=0)}
DINO_SIZES: dict[str, Any] = {
    "num_prototypes": 24, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "clip_per_tensor": None,
    "freeze_last_layer_epochs": 0.5,
}  # fmt: skip
MODELS = {
    "MAE": lambda: MAE("test_vim", VIM, decoder_embed_dim=32, decoder_depth=1, **TRAINING),
    "MAE of VMamba": lambda: MAE("test_vmamba", {}, decoder_embed_dim=32, decoder_depth=1, **TRAINING),
    "SimMIM": lambda: SimMIM("test_vmamba", **TRAINING),
    "ARM": lambda: ARM(
        "test_arm",
        {"patch_size": 8},
        cluster_size=4,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=4,
        **TRAINING,
    ),
    "Finetune": lambda: Finetune("test_vim", VIM, num_classes=4, layer_decay=0.7, **TRAINING),
    "DINO": lambda: DINO("test_vim", VIM, gram=Gram(first_step=1), **DINO_SIZES, **TRAINING),
    "iBOT": lambda: DINO(
        "test_vim", VIM, assign="sinkhorn", ibot=1.0, patch_prototypes=12, layer_decay=0.7, **DINO_SIZES, **TRAINING
    ),
    "LinearProbe": lambda: LinearProbe(
        encoder="test_vim", encoder_args=VIM, num_classes=4, learning_rates=[0.1], schedule=Cosine(warmup_epochs=0)
    ),
}
SIZES = {"MAE of VMamba": 64, "SimMIM": 64, "ARM": 64}


class Batches(LightningDataModule):
    """The same `GLOBAL` images a step for every number of ranks, each rank a part; one rank's are NaN at `bad`.

    With `local`, images come as two global views, and three local ones of that size.
    """

    mean, std, classes = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ("a", "b", "c", "d")

    def __init__(
        self, size: int = 32, bad: int | None = None, val: tuple[int, ...] = (), local: int | None = None
    ) -> None:
        super().__init__()
        self.image_size, self.bad, self.val, self.local = size, bad, val, local
        self.views = [SimpleNamespace(size=size), SimpleNamespace(size=local)] if local else None
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
            batch: dict[str, Any] = {"image": images[part]}
            if self.local:
                globals_ = torch.stack([images, images + 0.3], dim=1)[part]
                locals_ = torch.stack([images[..., : self.local, : self.local].roll(n, -1) for n in range(3)], dim=1)
                batch = {"views": [globals_, locals_[part]], "num_global": 2}
            batches.append({**batch, "label": (torch.arange(GLOBAL) % 4)[part]})
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
    """Keeps the gradients of the first step, whole, and the losses; spoils one row on the last rank at step 1."""

    def __init__(self, spoil: bool = False) -> None:
        self.spoil = spoil
        self.gradients: Arrays = {}
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: whole(parameter.grad)
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }
        if self.spoil and trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            local(next(p.grad for p in pl_module.parameters() if p.grad is not None and p.ndim == 4))[-1] = torch.nan

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

    draw = Masks.draw

    def of_views(self: Masks, N: int, grid: tuple[int, int], generator: Any = None) -> Drawn:
        table = draw(self, 2 * GLOBAL, grid, torch.Generator().manual_seed(7)).hidden
        hidden = table[int(os.environ.get("RANK", 0)) * N :][:N]
        counts = hidden.flatten(1).sum(dim=1)
        index = hidden.flatten().nonzero()[:, 0]
        return Drawn(hidden, index, 1 / (N * counts[index // (grid[0] * grid[1])].float()))

    Masks.draw = of_views  # type: ignore[method-assign]
    for module in (
        ssmpretrain.objectives.masked.mae,
        ssmpretrain.objectives.masked.simmim,
        ssmpretrain.objectives.contrastive.clip,
    ):
        module.random_mask = of_rank


class SaveAfterFirstEpoch(Callback):
    """Writes a checkpoint when the first epoch is over, and looks at the model on one rank only while it validates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module(torch.zeros(1, 3, 32, 32))


def train(
    name: str,
    strategy: Any = "auto",
    *,
    bad: int | None = None,
    spoil: bool = False,
    val: tuple[int, ...] = (),
    save: Path | None = None,
    ckpt_path: Path | None = None,
    epochs: int = 1,
) -> dict[str, Any]:
    """Train one model in this rank and return what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    same_masks()
    seed_everything(0, verbose=False)
    record, guard, model = Record(spoil), NonFiniteGuard(), MODELS[name]()
    callbacks = [
        record,
        guard,
        *([] if model.reported else [EMA(0.5)]),
        *([SaveAfterFirstEpoch(save)] if save else []),
    ]
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, logger=False, max_epochs=epochs,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        use_distributed_sampler=False, callbacks=callbacks, plugins=[CheckpointFiles()],
        gradient_clip_val=None if name == "LinearProbe" else 1.0,
    )  # fmt: skip
    size = SIZES.get(name, 32)
    data = Batches(size, bad, val, local=size // 2 if model.reads_views else None)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
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
    trained = results[0]["gradients"].keys()
    return {
        "gradients": max(distance(one["gradients"], alone["gradients"]) for one in results),
        "losses": max(abs(a - b) for one in results for a, b in zip(one["losses"], alone["losses"], strict=True)),
        "weights": max(distance(one["weights"], alone["weights"]) for one in results),
        "parameters equal": all(
            np.array_equal(one["weights"][name], results[0]["weights"][name]) for one in results for name in trained
        ),
        "skipped": [one["skipped"] for one in results],
        "metrics": [one["metrics"] for one in (*results, alone)],
    }


def ddp(folder: Path) -> dict[str, Any]:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"  # names parameters without a gradient, and checks the collectives
    report = {}
    for name, world in (("MAE", 4), ("SimMIM", 2), ("Finetune", 4), ("LinearProbe", 2), ("DINO", 2), ("iBOT", 4)):
        (alone,) = in_ranks(1, train, name)
        report[f"{name} on {world}"] = compared(in_ranks(world, train, name, "ddp"), alone)
    (alone,) = in_ranks(1, train, "MAE", bad=2)
    report["a NaN"] = compared(in_ranks(2, train, "MAE", "ddp", bad=2), alone)
    report["sinkhorn"] = {world: max(in_ranks(world, sinkhorn)) for world in (1, 2, 4)}
    return report


def sinkhorn() -> float:
    """Largest distance of the targets of this rank's rows from the published loop over the rows of all, in float64.

    The ranks have different numbers of rows, and the last of four has none.
    """
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    rows = [7, 2, 5, 0][:world]
    logits = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in rows]
    q = (torch.cat(logits).double() / 0.1).exp().T
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / 6
        q = q / q.sum(dim=0, keepdim=True) / sum(rows)
    theirs = (q * sum(rows)).T.split(rows)[rank]
    ours = sinkhorn_knopp(logits[rank], 0.1)
    return float((ours - theirs).abs().max()) if len(ours) else 0.0


def fsdp(folder: Path) -> dict[str, Any]:
    (alone,) = in_ranks(1, train, "MAE", bad=2, spoil=True, val=(3,))
    report = {"NaNs": compared(in_ranks(2, train, "MAE", "fsdp2", bad=2, spoil=True, val=(2, 1)), alone)}
    return report | interrupted(folder / "parts.ckpt", FSDP2(sharded_checkpoints=True))


def fsdp_more(folder: Path) -> dict[str, Any]:
    report = interrupted(folder / "one.ckpt", "fsdp2")
    for name in ("MAE of VMamba", "SimMIM", "Finetune", "DINO", "iBOT"):
        (alone,) = in_ranks(1, train, name)
        report[name] = compared(in_ranks(2, train, name, "fsdp2"), alone)
    report["ARM"] = compared(in_ranks(2, train, "ARM", "fsdp2"), in_ranks(2, train, "ARM", "ddp")[0])
    return report


def interrupted(path: Path, strategy: Any) -> dict[str, Any]:
    """Two epochs with an average and validation of uneven parts; and the second again, from a checkpoint, elsewhere."""
    (alone,) = in_ranks(1, train, "Finetune", val=(3, 1), epochs=2)
    whole = in_ranks(2, train, "Finetune", strategy, val=(3, 1), epochs=2, save=path)
    report = {"uninterrupted": compared(whole, alone)}
    for world, other, val in ((2, strategy, (3, 1)), (4, "fsdp2", (1, 1, 1, 1)), (2, "ddp", (3, 1)), (1, "auto", (4,))):
        again = in_ranks(world, train, "Finetune", other, val=val, epochs=2, ckpt_path=path)
        name = other if isinstance(other, str) else "the same"
        report[f"{name} on {world}"] = {
            "weights": max(distance(one["weights"], whole[0]["weights"]) for one in again),
            "metrics": [one["metrics"] for one in (*again, alone)],
        }
    return report


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = {"ddp": ddp, "fsdp": fsdp, "fsdp_more": fsdp_more}[sys.argv[1]]
        print("REPORT", json.dumps(job(Path(folder))))


if __name__ == "__main__":
    main()
