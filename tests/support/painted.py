"""Images with class maps for tests of segmentation: noisy rectangles on a dark ground, and a data module of them."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

CLASSES = ("ground", "grey", "white")


def painted(number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a noisy image (3, height, width) and its class map, uint8, with a border of 255 below."""
    generator = torch.Generator().manual_seed(number)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    for class_ in (1, 2):
        top, left = (int(torch.randint(side // 2, (), generator=generator)) for side in (height, width))
        mask[top : top + height // 2, left : left + width // 2] = class_
    image = mask.float().expand(3, -1, -1) - 1 + 0.3 * torch.randn(3, height, width, generator=generator)
    mask[-2:] = 255
    return image, mask


def batch(numbers: list[int], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Return a batch as the data modules give it in evaluation: images and masks padded at the right and below."""
    H, W = (max(size[side] for size in sizes) for side in (0, 1))
    images, masks = torch.zeros(len(numbers), 3, H, W), torch.full((len(numbers), H, W), 255, dtype=torch.uint8)
    for index, (number, (h, w)) in enumerate(zip(numbers, sizes, strict=True)):
        images[index, :, :h, :w], masks[index, :h, :w] = painted(number, h, w)
    keys = [f"{number:03d}" for number in numbers]
    return {"image": images, "mask": masks, "size": torch.tensor(sizes), "key": keys}


def twice(mask: Tensor) -> Tensor:
    """Return a class map of twice the height and width."""
    return mask.repeat_interleave(2, 0).repeat_interleave(2, 1)


class Painted(LightningDataModule):
    """Batches of two painted images; the validation images have several sizes, and `val` of them are on each rank."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    batch_size = 2
    train = "painted"

    def __init__(self, side: int = 32, steps: int = 4, val: tuple[int, ...] = (4,), classes: Any = CLASSES) -> None:
        super().__init__()
        self.image_size, self.steps, self.val, self.classes = (side, side), steps, val, classes

    def num_samples(self, split: str) -> int:
        return 2 * self.steps

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([batch([2 * step, 2 * step + 1], [self.image_size] * 2) for step in range(self.steps)],
                          batch_size=None)  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        first = sum(self.val[: self.trainer.global_rank]) if self.trainer.world_size > 1 else 0
        count = self.val[self.trainer.global_rank] if self.trainer.world_size > 1 else sum(self.val)
        batches = []
        for number in range(100 + first, 100 + first + count):
            one = batch([number], [(24 + number % 3 * 8, 40)])
            one["whole_mask"] = [twice(one["mask"][0])]
            batches.append(one)
        return DataLoader(batches, batch_size=None)
