"""A custom data set: scikit-learn's handwritten digits, read from memory, without shards or files.

    python examples/custom_dataset.py     # MAE, a few seconds on a CPU
    python -m ssmpretrain fit --config examples/custom_objective.yaml --data examples.custom_dataset.HandwrittenDigits

An objective reads `batch["image"]`, (B, 3, H, W) float32, normalised. Objectives with labels also read
`batch["label"]`, (B,) int64. From the data module they read `image_size`, `mean` and `std`: the encoder is built for
this size, and exported files store all three. Our own data modules offer more: exact resume within an epoch, equal
batches on all ranks, counts of bad samples, and the loaders that the callback `OnlineEvaluation` and the objective
`LinearProbe` need.
"""

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ssmpretrain.objectives import MAE
from ssmpretrain.training import AdamW


class Digits(Dataset[dict[str, Tensor]]):
    """scikit-learn's 1797 digits, 8 x 8 pixels, as normalised colour images.

    Args:
        train: Take the first 1500 images if true, the other 297 if false.
        image_size: Side of the enlarged images in pixels.
        mean: Mean of the pixels in [0, 1], the same for the three channels.
        std: Standard deviation of these pixels, above 0.
    """

    def __init__(self, train: bool, image_size: int, mean: float, std: float) -> None:
        digits = load_digits()
        part = slice(None, 1500) if train else slice(1500, None)
        pixels = torch.from_numpy(digits.images[part]).float().unsqueeze(1) / 16  # (N, 1, 8, 8), in [0, 1]
        pixels = F.interpolate(pixels, (image_size, image_size), mode="bilinear")
        self.images = ((pixels - mean) / std).expand(-1, 3, -1, -1)
        self.labels = torch.from_numpy(digits.target[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


class HandwrittenDigits(LightningDataModule):
    """Loaders of `Digits` for training and validation.

    Args:
        batch_size: Images per batch on one device.
        image_size: Side of the images in pixels.
    """

    def __init__(self, batch_size: int = 64, image_size: int = 32) -> None:
        super().__init__()
        self.batch_size, self.image_size = batch_size, image_size
        self.mean, self.std = (0.305,) * 3, (0.376,) * 3  # per channel

    def _loader(self, train: bool) -> DataLoader[dict[str, Tensor]]:
        dataset = Digits(train, self.image_size, self.mean[0], self.std[0])
        return DataLoader(dataset, self.batch_size, shuffle=train, drop_last=train)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(train=False)


def main(epochs: int = 5, image_size: int = 16) -> float:
    """Train MAE with a small Vim on the digits and return its loss on the validation images."""
    seed_everything(0)
    encoder_args = {"patch_size": 4, "embed_dim": 64, "depth": 4, "pos_embed": "sincos"}
    model = MAE("test_vim", encoder_args, decoder_embed_dim=64, decoder_depth=1, optimizer=AdamW(lr_per_256=1.6e-2))
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, HandwrittenDigits(image_size=image_size))
    return float(trainer.callback_metrics["val/loss"])


if __name__ == "__main__":
    print(f"val/loss {main():.3f}")
