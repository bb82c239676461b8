"""Batches: samples are augmented, stacked, normalised and erased, ready for an objective."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import NotRequired

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import seed_transforms, stable_hash
from ssmpretrain.datamodules.decoding.batch_memory import room_for
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, DecodedSample, Sample, decode_sample
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels


class Pixels(TypedDict, total=False):
    """Images of a batch of B samples: one view of each sample under `image`, or several under `views`.

    image: Images, (B, 3, H, W), float32, normalised by mean and std.
    views: Views of each size, (B, V, 3, H, W), as `image`; global views are the first ones of the first tensor.
    num_global: Number of global views.
    """

    image: Tensor
    views: list[Tensor]
    num_global: int


class ImageBatch(Pixels):
    """A batch of images. Every data module yields batches of this form.

    Training batches of a data module with `views` hold `views` and `num_global`; all other batches hold `image`.

    label: Labels, (B,), int64; -1 for a sample without a label.
    key: Names of the B samples, unique within a data set.
    """

    label: Tensor
    key: list[str]


class PreparedSample(Sample):
    """One augmented sample at its final size, and the seed of its augmentation.

    image: Image, (3, H, W), uint8.
    views: In the place of the image, if the data have several views of it: the views of each size, (3, H, W), uint8.
    whole_mask: The class map before augmentation, (h, w), uint8, if the data have class maps.
    objects: Objects of the augmented image, if the data have objects.
    """

    seed: int
    image: NotRequired[Tensor]
    views: NotRequired[list[list[Tensor]]]
    whole_mask: NotRequired[Tensor]
    objects: NotRequired[Any]


class Batcher:
    """Turn raw samples into one batch.

    Args:
        transform: Transform of each decoded image, called with the image and `seed`; subclasses may take another kind.
        mean, std: Mean and standard deviation of each channel, for images in [0, 1].
        seed: Chooses the augmentation, together with the epoch, the sample and the number of its copy.
        random_erasing: Probability that a rectangle of a normalised image becomes noise, in [0, 1].
        max_pixels: Largest number of pixels of an image that is decoded.
        require_labels: Whether a sample without a label counts as bad.
    """

    def __init__(
        self,
        transform: Any,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        random_erasing: float = 0.0,
        max_pixels: int = MAX_PIXELS,
        require_labels: bool = False,
    ) -> None:
        self.transform = transform
        self.max_pixels, self.require_labels = max_pixels, require_labels
        self.seed = seed
        self.erase = _erasing(random_erasing) if random_erasing > 0 else None
        self.mean = torch.tensor(mean).view(3, 1, 1) * 255
        self.std = torch.tensor(std).view(3, 1, 1) * 255

    def prepare(self, decoded: DecodedSample, epoch: int, sample: str, copy: int = 0) -> PreparedSample:
        """Augment one sample. The result depends on seed, epoch, sample and copy alone, not on the process."""
        key = (self.seed, epoch, sample)
        return self.transformed(decoded, stable_hash(*key, copy) if copy else stable_hash(*key))

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """Decode one sample.

        Raises:
            BadSample: As `decode_sample`, and if a label is required and missing.
        """
        decoded = decode_sample(raw, labels, self.max_pixels)
        if self.require_labels and decoded["label"] == UNLABELLED:
            raise BadSample("samples without a label", "no cls, and no label in json")
        return decoded

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment one sample with this seed."""
        prepared: PreparedSample = {"label": decoded["label"], "key": decoded["key"], "seed": seed}
        pixels = self.transform(decoded["image"], seed=seed)
        prepared["image" if isinstance(pixels, Tensor) else "views"] = pixels
        return prepared

    def collate(self, samples: Sequence[PreparedSample]) -> ImageBatch:
        """Stack prepared samples into a batch, normalise the images and erase rectangles.

        Raises:
            DataError: If the images are not all (3, H, W) with one height and width.
        """
        batch: ImageBatch = {  # images first: Lightning reads the size of a batch from its first tensor
            **self._pixels(samples),
            "label": torch.tensor([sample["label"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
        }
        if self.erase is not None:
            for number, sample in enumerate(samples):
                seed_transforms(stable_hash("erase", sample["seed"]))
                self.erase(batch["image"][number])
        return batch

    def _pixels(self, samples: Sequence[PreparedSample]) -> Pixels:
        """Return the normalised images of a batch, or their views."""
        if "views" not in samples[0]:
            return {"image": self._normalised([sample["image"] for sample in samples])}
        sizes = zip(*(sample["views"] for sample in samples), strict=True)  # of each size, the views of all samples
        stacked = [self._normalised(chain.from_iterable(of_size)) for of_size in sizes]
        views = [of_size.view(len(samples), -1, *of_size.shape[1:]) for of_size in stacked]
        return {"views": views, "num_global": self.transform.num_global}

    def _normalised(self, images: Iterable[Tensor]) -> Tensor:
        """Stack and normalise images, (3, H, W) uint8 each."""
        images = list(images)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1 or len(shape := min(shapes)) != 3 or shape[0] != 3:
            raise DataError(
                f"batch: images have 3 channels and one height and width; got {sorted(shapes)}. "
                "Let the transform bring all images to one size."
            )
        stacked = room_for((len(images), *shape))
        for row, image in zip(stacked, images, strict=True):  # one image at a time stays in the processor's cache
            torch.sub(image, self.mean, out=row).div_(self.std)
        return stacked


def _erasing(probability: float) -> Callable[[Tensor], Tensor]:
    """Return timm's random erasing with the published settings: one rectangle of normal noise, in place."""
    from timm.data.random_erasing import RandomErasing

    options: dict[str, Any] = {"mode": "pixel", "max_count": 1, "device": "cpu"}
    erase: Callable[[Tensor], Tensor] = RandomErasing(probability, **options)  # type: ignore[no-untyped-call]
    return erase
