"""Batches of images with class maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.datamodules.decoding.batcher import Batcher, PreparedSample
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, DecodedSample, check_pixels, decode_rgb, image_of
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels
from ssmpretrain.datamodules.targets.batches import IGNORED, SegmentationBatch
from ssmpretrain.datamodules.targets.class_map import (
    class_table,
    decode_class_map,
    renumbered,
)
from ssmpretrain.datamodules.targets.padding import stack_images, stack_maps
from ssmpretrain.datamodules.targets.segmentation_transforms import EvalSegmentation, TrainSegmentation


class SegmentationBatcher(Batcher):
    """Turn raw samples with an image and a class map `seg.png` into one batch.

    Args:
        transform: Augments image and class map in training, or resizes them in evaluation.
        mean, std: Mean and standard deviation of each channel, for images in [0, 1].
        seed: Chooses the augmentation, together with the epoch, the sample and the number of its copy.
        num_classes: Number of classes, used if the source of a sample does not name its classes.
        max_pixels: Largest number of pixels of an image that is decoded.
    """

    def __init__(
        self,
        transform: TrainSegmentation | EvalSegmentation,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        num_classes: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(transform, mean, std, seed, max_pixels=max_pixels)
        self.num_classes = num_classes

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """Decode the image and the class map of one sample. The image has no label of its own.

        Args:
            raw: Fields of the sample, undecoded.
            labels: The classes of the pixels, and their numbers if another list numbers them.

        Raises:
            BadSample: If the sample lacks an image or a class map, one of them cannot be decoded, their sizes differ,
                or the class map has a number that is no class.
        """
        image = image_of(raw)
        check_pixels(image, self.max_pixels)
        mask = self.class_map(raw, labels)
        return {"image": decode_rgb(image), "label": UNLABELLED, "key": raw["__key__"], "mask": mask}

    def class_map(self, raw: dict[str, Any], labels: Labels) -> Tensor:
        """Decode the class map of one sample alone; raise as `decode`."""
        known, count = labels.known, len(labels.known.names) or self.num_classes or 0
        named = f"{known.source} names {count:,} classes" if known else f"num_classes is {count:,}"
        table = renumbered(class_table(count), labels.numbers)
        return decode_class_map(raw, table, named, self.max_pixels)

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment image and class map with this seed, or resize them for evaluation."""
        image, mask = self.transform(decoded["image"], decoded["mask"], seed)
        return {
            "image": image,
            "label": decoded["label"],
            "key": decoded["key"],
            "mask": mask,
            "whole_mask": decoded["mask"],
            "seed": seed,
        }

    def collate(self, samples: Sequence[PreparedSample]) -> SegmentationBatch:
        """Normalise, pad and stack prepared samples; a training batch has the size of the crop."""
        crop = self.transform.crop if isinstance(self.transform, TrainSegmentation) else None
        image, size = stack_images([sample["image"] for sample in samples], self.mean, self.std, crop or (1, 1))
        batch: SegmentationBatch = {
            "image": image,
            "label": torch.tensor([sample["label"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
            "mask": stack_maps([sample["mask"] for sample in samples], (image.shape[2], image.shape[3]), IGNORED),
            "size": size,
        }
        if crop is None:
            batch["whole_mask"] = [sample["whole_mask"] for sample in samples]
        return batch
