"""Trains and validates a segmentation on one and two ranks and prints, as JSON, the scores of each rank."""

import json
import logging
import os
import tempfile
import warnings
from typing import Any

import torch
from forked_ranks import in_ranks
from lightning.pytorch import Trainer, seed_everything
from painted import Painted

from ssmpretrain.objectives import Segmentation
from ssmpretrain.objectives.dense.heads import FCN, Segmenter, UPerNet
from ssmpretrain.training.optim import AdamW, Poly

HEADS: dict[str, dict[str, Any]] = {
    "UPerNet": {"head": UPerNet(16), "auxiliary": FCN(8)},
    "Segmenter": {"head": Segmenter(depth=1)},
}
SHARES = (4, 3)  # validation images on each rank


def scores(encoder: str, head: str, train: bool) -> dict[str, float]:
    """Return the scores that this rank logs, after an epoch of training or with the first weights."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seed_everything(0, verbose=False)
    model = Segmentation(
        encoder, num_classes=3, **HEADS[head], optimizer=AdamW(lr_per_256=0.3), schedule=Poly()
    )  # fmt: skip
    world = int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False, max_epochs=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
            use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        if train:
            trainer.fit(model, datamodule=Painted(val=SHARES))
        else:
            trainer.validate(model, datamodule=Painted(val=SHARES), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def main() -> None:
    report = {}
    for encoder, head in (("test_vim", "UPerNet"), ("test_vmamba", "UPerNet"), ("test_vim", "Segmenter")):
        report[f"{encoder} {head}"] = {
            "alone": in_ranks(1, scores, encoder, head, False),
            "two": in_ranks(2, scores, encoder, head, False),
            "trained": in_ranks(2, scores, encoder, head, True),
        }
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
