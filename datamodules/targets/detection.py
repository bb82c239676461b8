"""Batches of images with objects."""

from collections.abc import Sequence
from typing import Any

import torch

from ssmpretrain.datamodules.decoding.batcher import Batcher, PreparedSample
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, DecodedSample, check_pixels, decode_rgb, image_of
from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject, DroppedObjects
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels
from ssmpretrain.datamodules.targets.annotations import EMPTY_MASK, annotation_of, renumber, why_untrainable
from ssmpretrain.datamodules.targets.batches import Annotation, DetectionBatch, Objects
from ssmpretrain.datamodules.targets.detection_transforms import EvalDetection, TrainDetection
from ssmpretrain.datamodules.targets.padding import stack_images
from ssmpretrain.datamodules.targets.run_lengths import count_pixels


class DetectionBatcher(Batcher):
    """Turn raw samples with an image and an annotation `json` into one batch.

    Args:
        transform: Augments image and objects in training, or resizes them in evaluation.
        mean, std: Mean and standard deviation of each channel, for images in [0, 1].
        seed: Chooses the augmentation, together with the epoch, the sample and the number of its copy.
        num_classes: Number of classes, used if the source of a sample does not name its classes.
        max_pixels: Largest number of pixels of an image that is decoded.
        dropped: Counts the objects that do not train and are left out; None keeps all objects, for evaluation.
    """

    def __init__(
        self,
        transform: TrainDetection | EvalDetection,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        num_classes: int | None = None,
        max_pixels: int = MAX_PIXELS,
        dropped: DroppedObjects | None = None,
    ) -> None:
        super().__init__(transform, mean, std, seed, max_pixels=max_pixels)
        self.num_classes, self.dropped = num_classes, dropped

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """Decode the image and read the annotation of one sample. The image has no label of its own.

        Args:
            raw: Fields of the sample, undecoded.
            labels: The classes of the objects, and their numbers if another list numbers them.

        Raises:
            BadSample: If the sample lacks an image or an annotation, one of them cannot be decoded, their sizes differ,
                or an object is wrong.
        """
        known, count = labels.known, len(labels.known.names) or self.num_classes or 0
        named = f"{known.source} names {count:,} classes" if known else f"num_classes is {count:,}"
        annotation = renumber(annotation_of(raw, count, named), labels.numbers)
        if self.dropped is not None:
            annotation = _trainable(annotation, raw["__key__"], self.dropped)
        image = image_of(raw)
        check_pixels(image, self.max_pixels)
        return {"image": decode_rgb(image), "label": UNLABELLED, "key": raw["__key__"], "annotation": annotation}

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment image and objects with this seed, or resize them for evaluation."""
        image, objects = self.transform(decoded["image"], decoded["annotation"], seed)
        return {
            "image": image,
            "label": decoded["label"],
            "key": decoded["key"],
            "annotation": decoded["annotation"],
            "objects": objects,
            "seed": seed,
        }

    def collate(self, samples: Sequence[PreparedSample]) -> DetectionBatch:
        """Normalise, pad and stack prepared samples; the masks get the size of the batch's images."""
        is_training = isinstance(self.transform, TrainDetection)
        least = (self.transform.size if is_training else None) or (1, 1)
        image, size = stack_images([sample["image"] for sample in samples], self.mean, self.std, least)
        annotations: list[Any] = [sample["annotation"] for sample in samples]
        has_masks = is_training and self.transform.masks and any("masks" in sample["objects"] for sample in samples)
        batch: DetectionBatch = {
            "image": image,
            "label": torch.tensor([sample["label"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
            "objects": [_padded(sample["objects"], image.shape[-2:], has_masks) for sample in samples],
            "size": size,
            "whole_size": torch.tensor([[one["height"], one["width"]] for one in annotations]),
        }
        if not is_training:
            batch["annotation"] = annotations
        return batch


def _trainable(annotation: Annotation, key: str, dropped: DroppedObjects) -> Annotation:
    """Return the annotation without the objects that do not train, which are counted."""
    kept = []
    for place, one in enumerate(annotation["objects"]):
        cause = why_untrainable(one, annotation["height"], annotation["width"])
        if cause is None and "segmentation" in one and not count_pixels(one["segmentation"]):
            cause = EMPTY_MASK
        if cause is None:
            kept.append(one)
        else:
            dropped.add(DroppedObject(cause, "", key, place))
    return {**annotation, "objects": kept}


def _padded(objects: Any, size: torch.Size, has_masks: bool) -> Objects:
    """Return objects whose masks, if the batch has masks, are padded to a size at the right and below."""
    padded: Objects = {"boxes": objects["boxes"], "classes": objects["classes"], "crowd": objects["crowd"]}
    if has_masks and ("masks" in objects or not len(objects["classes"])):
        padded["masks"] = torch.zeros(len(objects["classes"]), *size, dtype=torch.bool)
        if "masks" in objects:
            h, w = objects["masks"].shape[1:]
            padded["masks"][:, :h, :w] = objects["masks"]
    return padded
