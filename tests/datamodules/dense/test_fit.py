"""Training on class maps under a Trainer: order, resume to the bit, and workers."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ssmpretrain.datamodules import SegmentationFolder


class Killed(Exception):
    """Stand-in for SIGKILL: no code saves or cleans up after it."""


class Pixels(LightningModule):
    """A class for each pixel from its colour alone; keeps the keys and losses of the batches."""

    def __init__(self, die_after: int | None = None) -> None:
        super().__init__()
        self.layer, self.die_after = torch.nn.Conv2d(3, 4, 1), die_after
        self.seen: list[tuple[list[str], float]] = []
        torch.nn.init.zeros_(self.layer.weight)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.layer(batch["image"]), batch["mask"].long(), ignore_index=255)
        self.seen.append((batch["key"], loss.item()))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.die_after:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "stopped.ckpt")
            raise Killed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder: Path, workers: int = 0, die_after: int | None = None, resume: bool = False) -> Pixels:
    torch.manual_seed(0)
    model = Pixels(die_after)
    data = SegmentationFolder(
        str(folder / "images"),
        train_masks=str(folder / "masks"),
        num_classes=4,
        batch_size=4,
        image_size=24,
        num_workers=workers,
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    path = str(folder / "stopped.ckpt") if resume else None
    with suppress(Killed):
        trainer.fit(model, data, ckpt_path=path, weights_only=True)
    return model


@pytest.mark.parametrize(("stopped", "workers"), [(3, 2), (7, 0)])
def test_a_killed_run_goes_on_to_the_bit_with_other_workers(
    write_folder: Callable[..., Path], stopped: int, workers: int
) -> None:
    folder = write_folder()
    (folder / "masks/09.png").write_bytes(b"")  # a good sample replaces it, also after the restart
    whole = train(folder)
    begun, rest = train(folder, die_after=stopped), train(folder, workers, resume=True)
    assert len(begun.seen) == stopped and begun.seen + rest.seen == whole.seen
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    losses = [loss for _, loss in whole.seen]
    assert len(losses) == 10 and sum(losses[5:]) < sum(losses[:5])
