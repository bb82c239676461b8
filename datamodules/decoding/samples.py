"""From the bytes of one sample to a tensor, and from tensors to the batch that an objective sees."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from typing_extensions import NotRequired

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import seed_transforms
from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.decoding.batch_memory import room_for
from ssmpretrain.datamodules.decoding.centre_crop import resized_centre_crop
from ssmpretrain.datamodules.decoding.image_header import num_scans, pixel_size
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels
from ssmpretrain.datamodules.order.plan import stable_hash
from ssmpretrain.datamodules.shards.shard_index import IMAGE_EXTENSIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear")
MAX_PIXELS = 100_000_000  # 300 MB decoded; the largest images of LAION-5B have half of that
# A decoder passes over all pixels once a scan. Progressive JPEGs have some ten; libjpeg-turbo's own tools stop at 500.
_MOST_SCANS = 500
_MOST_PASSES = 16  # over max_pixels


class ImageBatch(TypedDict):
    """What every data module yields.

    image: (B, 3, H, W), float32, normalised by mean and std.
    label: (B,), int64, -1 where the sample has no label.
    key: B names, unique within a data set.
    """

    image: Tensor
    label: Tensor
    key: list[str]


class DecodedSample(TypedDict):
    """One sample: image (3, H, W) uint8, label -1 when there is none, captions where the data have some."""

    image: Tensor
    label: int
    key: str
    captions: NotRequired[list[str]]


class PreparedSample(DecodedSample):
    """One sample at its final size, and the seed that its augmentation was drawn from."""

    seed: int


class ImageTransform:
    """Bring a decoded image to one size: MAE's augmentation in training, a centre crop in evaluation.

    Args:
        image_size: (H, W) of the result.
        crop_scale: Area of the random crop as a fraction of the image, (least, most); None for evaluation.
        flip: Whether a training image is mirrored half of the time.
        eval_crop_ratio: Fraction of the resized image's side that the centre crop keeps, in (0, 1].
        interpolation: "bicubic" or "bilinear", for both crops.
        further: Applied to a training image after crop and flip; (3, H, W) uint8 to the same.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), table 8.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] | None,
        flip: bool,
        eval_crop_ratio: float,
        interpolation: str = "bicubic",
        further: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> None:
        self.image_size = image_size
        self.eval_crop_ratio = eval_crop_ratio
        self.interpolation = v2.InterpolationMode(interpolation)
        self.train: v2.Transform | None = None
        if crop_scale is not None:
            crop = v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=self.interpolation)
            mirror = [v2.RandomHorizontalFlip()] if flip else []
            self.train = v2.Compose([crop, *mirror, *further])

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """(3, h, w) uint8 -> (3, H, W) uint8; the seed decides everything that is random."""
        if self.train is not None:
            seed_transforms(seed)
            augmented: Tensor = self.train(image)
            return augmented
        h, w = image.shape[-2:]
        return resized_centre_crop(image, self._resized(h, w), self.image_size, self.interpolation)

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """Height and width before the centre crop, to the pixel as timm and open_clip have them."""
        H, W = (math.floor(side / self.eval_crop_ratio) for side in self.image_size)
        if H == W:  # of the longer side torchvision cuts off what is no whole pixel
            return (int(H * h / w), H) if w <= h else (H, int(H * w / h))
        scale = min(h / H, w / W)
        return round(h / scale), round(w / scale)


class Batcher:
    """Turn raw samples into one batch.

    Args:
        transform: Applied to each decoded image.
        mean, std: Per channel, for images in [0, 1].
        seed: Chooses the augmentation together with the epoch, the sample and its copy.
        random_erasing: Probability that a rectangle of a normalised image becomes noise, in [0, 1].
        max_pixels: An image of more is not decoded.
        require_labels: Whether a sample without a label is a bad one.
    """

    def __init__(
        self,
        transform: ImageTransform,
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
        """Augment one sample; the same for the same seed, epoch, sample and copy, in whichever process."""
        key = (self.seed, epoch, sample)
        return self.transformed(decoded, stable_hash(*key, copy) if copy else stable_hash(*key))

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """`decode_sample` within the limits; raises as it does, and where a label that is required is missing."""
        decoded = decode_sample(raw, labels, self.max_pixels)
        if self.require_labels and decoded["label"] == UNLABELLED:
            raise BadSample("samples without a label", "no cls, and no label in json")
        return decoded

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment one sample as the seed decides."""
        image = self.transform(decoded["image"], seed=seed)
        return {"image": image, "label": decoded["label"], "key": decoded["key"], "seed": seed}

    def collate(self, samples: Sequence[PreparedSample]) -> ImageBatch:
        """Stack prepared samples, normalise and erase.

        Raises:
            DataError: If they are not all (3, H, W) of one size.
        """
        shapes = {tuple(sample["image"].shape) for sample in samples}
        if len(shapes) > 1 or len(shape := min(shapes)) != 3 or shape[0] != 3:
            raise DataError(
                f"batch: images have 3 channels and one height and width; got {sorted(shapes)}. "
                "Let the transform bring all images to one size."
            )
        image = room_for((len(samples), *shape))
        for row, sample in zip(image, samples, strict=True):  # one by one they stay in the processor's cache
            torch.sub(sample["image"], self.mean, out=row).div_(self.std)
        if self.erase is not None:
            for number, sample in enumerate(samples):
                seed_transforms(stable_hash("erase", sample["seed"]))
                self.erase(image[number])
        return {
            "image": image,
            "label": torch.tensor([sample["label"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
        }


def _erasing(probability: float) -> Callable[[Tensor], Tensor]:
    """timm's random erasing with the published settings: one rectangle, of normal noise per pixel; in place."""
    from timm.data.random_erasing import RandomErasing

    options: dict[str, Any] = {"mode": "pixel", "max_count": 1, "device": "cpu"}
    erase: Callable[[Tensor], Tensor] = RandomErasing(probability, **options)  # type: ignore[no-untyped-call]
    return erase


def decode_sample(raw: dict[str, Any], labels: Labels, max_pixels: int = MAX_PIXELS) -> DecodedSample:
    """Decode the image (RGB) of one raw sample, and read its label.

    Raises:
        BadSample: If it has no image, its image is too large or cannot be decoded, or its label is bad.
    """
    encoded, label = check_sample(raw, labels)
    check_pixels(encoded, max_pixels)
    return {"image": decode_rgb(encoded), "label": label, "key": raw["__key__"]}


def check_pixels(encoded: bytes, max_pixels: int) -> None:
    """Look at the header and scans of an image, before a decoder makes room and time for what they announce.

    Raises:
        BadSample: If it is no JPEG, PNG or WebP image, has more pixels, or would take long to decode.
    """
    try:
        width, height = pixel_size(encoded)
        scans = num_scans(encoded)
    except ValueError as error:
        raise BadSample("undecodable images", str(error)) from None
    if width * height > max_pixels:
        raise BadSample("giant images", f"{width:,} x {height:,} pixels")
    if scans > _MOST_SCANS or scans * width * height > _MOST_PASSES * max_pixels:
        raise BadSample("images of too many scans", f"{scans:,} scans of {width:,} x {height:,} pixels")


def check_sample(raw: dict[str, Any], labels: Labels) -> tuple[bytes, int]:
    """The encoded image and the label of one raw sample.

    Raises:
        BadSample: If it has no image, or its label is bad and `labels` judges.
    """
    encoded = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if encoded is None:
        fields = sorted(name for name in raw if not name.startswith("__"))
        raise BadSample("samples without an image", f"fields: {', '.join(fields) or 'none'}")
    return encoded, labels.read(raw)


def decode_rgb(encoded: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP image to (3, h, w) uint8, pixels as they are stored: EXIF's orientation is ignored.

    Raises:
        BadSample: If the bytes are not one whole image.
    """
    if not encoded:
        raise BadSample("undecodable images", "0 bytes")
    try:
        image: Tensor = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise BadSample("undecodable images", str(error).splitlines()[0].partition(". ")[0][:80]) from None
    if image.ndim != 3:
        raise BadSample("undecodable images", f"{len(image):,} frames, where one is needed")
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)  # PNG of 16 bits


def check_image_size(image_size: int | Sequence[int], where: str) -> tuple[int, int]:
    """Read an image size, one number for a square or (height, width).

    Raises:
        DataError: If it is not one or two positive integers, or the images are larger than any that is decoded.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(
            f"{where}: image_size is a positive number of pixels, or height and width; got {image_size}. Use 224, say."
        )
    if sides[0] * sides[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: image_size has at most {MAX_PIXELS:,} pixels; got {sides[0]:,} x {sides[1]:,}. Use 224, say."
        )
    return sides[0], sides[1]


def check_crop_ratio(ratio: float, image_size: Sequence[int], where: str) -> None:
    """Check the fraction that the evaluation's centre crop keeps of an image.

    Raises:
        DataError: If it is not in (0, 1], or images would be resized to more pixels than any that is decoded.
    """
    if not 0 < ratio <= 1:
        raise DataError(f"{where}: eval_crop_ratio is in (0, 1]; got {ratio}. Use 0.875, say.")
    if math.prod(side / ratio for side in image_size) > MAX_PIXELS:
        raise DataError(
            f"{where}: images are resized to image_size / eval_crop_ratio before the crop, at most {MAX_PIXELS:,} "
            f"pixels; got {ratio} for {image_size[0]:,} x {image_size[1]:,}. Use 0.875, say."
        )
