"""Tiny runs of Segmentation and Detection."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from ssmpretrain.objectives import Dense, Detection, Segmentation
from ssmpretrain.objectives.dense.detectors import BoxHead, Detector, MaskHead, Neck, Proposals
from ssmpretrain.objectives.dense.heads import Linear

NAMES = ["sky", "größe", "tree"]


class Scenes(LightningDataModule):
    """One batch of two noise images of 64 x 64 pixels, with class maps and objects."""

    image_size, mean, std, classes = (64, 64), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], NAMES
    batch_size, eval_size, antialias = 2, (48, 96), False

    def train_dataloader(self) -> DataLoader[Any]:
        noise = torch.Generator().manual_seed(0)
        objects = {
            "boxes": torch.tensor([[4.0, 4, 40, 50]]),
            "classes": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.bool),
            "crowd": torch.tensor([False]),
        }
        batch = {
            "image": torch.randn(2, 3, 64, 64, generator=noise),
            "mask": torch.randint(3, (2, 64, 64), generator=noise, dtype=torch.uint8),
            "objects": [objects, objects],
            "size": torch.tensor([[64, 64]] * 2),
            "whole_size": torch.tensor([[64, 64]] * 2),
            "key": ["a", "b"],
        }
        return DataLoader([batch], batch_size=None)


def tiny_segmentation(**changes: Any) -> Segmentation:
    torch.manual_seed(0)
    args = {"encoder": "test_vim", "encoder_args": {"patch_size": 8}, "num_classes": 3, "head": Linear()}
    return Segmentation(**{**args, **changes})


def tiny_detection(**changes: Any) -> Detection:
    """A detector with 12 detections for each image at most."""
    torch.manual_seed(0)
    detector = Detector(
        max_detections=12, samples=8, proposals=Proposals(before_nms=(50, 50), after_nms=20),
        box_head=BoxHead(width=16), mask_head=MaskHead(convs=1, width=8), **changes.pop("detector", {}),
    )  # fmt: skip
    args = {"encoder": "test_vmamba", "num_classes": 3, "detector": detector, "neck": Neck(width=8)}
    return Detection(**{**args, **changes})


def fit_one_step(folder: Path, model: Dense) -> Path:
    """What `fit` leaves of one step in a run folder."""
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, Scenes())
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder
