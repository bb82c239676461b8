"""Augmentation policies of timm: RandAugment, AutoAugment, AugMix and 3-Augment."""

import re
from collections.abc import Sequence

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.errors import DataError

_NUMBER = r"\d+(\.\d+)?"
_FRACTION = r"(0(\.\d+)?|1(\.0+)?)"
# Sections that the string of each policy may have. timm ignores an unknown section, such as "inc" without a digit.
_SECTIONS = {
    "rand": rf"m\d+|n[1-9]|p{_FRACTION}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)",
    "augmix": rf"m\d+|w[1-9]|d[1-9]|a{_NUMBER}|b[01]|mstd{_NUMBER}",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), rf"mstd{_NUMBER}"),
}


class PolicyAugment:
    """Apply the random operations of a timm policy, with the settings of `timm.data.create_transform`.

    The operations draw from the global generators of Python and NumPy.

    Args:
        policy: Configuration string of timm, checked by `check_policy`.
        image_size: (H, W); some operations move the image by a fraction of the shorter side.
        mean: Mean of each channel, for images in [0, 1]. Areas from outside the image get this colour.
        interpolation: "bicubic" or "bilinear".
    """

    def __init__(self, policy: str, image_size: tuple[int, int], mean: Sequence[float], interpolation: str) -> None:
        from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        options = {
            "translate_const": int(min(image_size) * 0.45),
            "img_mean": tuple(min(255, max(0, round(255 * value))) for value in mean),
            "interpolation": str_to_pil_interp(interpolation),  # type: ignore[no-untyped-call]
        }
        name = policy.partition("-")[0]
        if name == "rand":
            self.operations = rand_augment_transform(policy, options)
            steps = self.operations.ops
        elif name == "augmix":
            self.operations = augment_and_mix_transform(policy, {**options, "translate_pct": 0.3})
            steps = self.operations.ops
        else:
            self.operations = auto_augment_transform(policy, options)
            steps = [step for several in self.operations.policy for step in several]
        for step in steps:
            if step.name.startswith("Posterize"):
                step.aug_fn = _posterize

    def __call__(self, image: Tensor) -> Tensor:
        """Return an augmented image, (3, H, W) uint8, for an image of the same shape."""
        augmented: Tensor = F.pil_to_tensor(self.operations(F.to_pil_image(image)))
        return augmented


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest bits of each value, as timm does; also accept 0 bits, which timm draws and Pillow 13 refuses."""
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else image.point(lambda _: 0)


def check_policy(policy: str | None, where: str) -> None:
    """Check the string of a policy; None stands for no policy.

    Raises:
        DataError: If timm would ignore or misread a part of the string. The message names this part.
    """
    if policy is None:
        return
    name, *sections = str(policy).split("-")
    wrong = next((text for text in sections if not re.fullmatch(_SECTIONS.get(name, ""), text)), "")
    if name in _SECTIONS and not wrong and not policy.endswith("-"):
        return
    reason = f"{name} takes no section {wrong!r}" if name in _SECTIONS else f"there is no policy {name!r}"
    raise DataError(
        f"{where}: auto_augment is a policy of timm, one of {', '.join(_SECTIONS)}, with its sections, such as "
        f"rand-m9-mstd0.5-inc1; got {policy!r}: {reason}. Correct it, or leave it out."
    )
