"""Class probabilities of an image of any size: whole or in sliding windows, at several scales, with its mirror image.

Legend: K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError


@dataclass(frozen=True)
class Inference:
    """Settings of `predict`. The defaults give the model the whole image once.

    Args:
        slide: Whether the model gets windows of the image instead of the whole image.
        window: Height and width of a window in pixels; published: 512, 512.
        stride: Steps between windows in pixels, down and to the right; at most the window. Published: 341, 341.
        scales: The image is resized by each of these ratios; published for "multi-scale": 0.5, 0.75, 1, 1.25, 1.5, 1.75.
        flip: Whether the mirror image is predicted too, at each scale.

    Raises:
        UserError: If a number is out of range.
    """

    slide: bool = False
    window: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        pairs = zip(self.stride, self.window, strict=True)
        if len(self.window) != 2 or not all(1 <= stride <= window for stride, window in pairs):
            raise UserError(
                f"Inference: stride is from 1 pixel to window, (height, width) each; got stride {self.stride} and window "
                f"{self.window}. 341 and 512 are usual."
            )
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise UserError(
                f"Inference: scales are ratios above 0, at most 16; got {self.scales}. (1.0,) is one scale."
            )


def predict(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    inference: Inference | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Predict the probability of each class at each pixel.

    The logits of every scale and of its mirror image are resized to `size`; the softmax of each is taken there, and
    averaged. Windows average logits, before the softmax. Resizing is bilinear.

    Args:
        model: Maps images (1, 3, h, w) to logits (1, K, h, w), for any h and w that the settings give.
        image: Normalised image, (1, 3, H, W).
        inference: The settings; by default the whole image once.
        size: Height and width of the result, such as those of the image's file; by default H, W.

    Returns:
        Probabilities (K, height, width), float32, on the device of the image.

    Raises:
        UserError: If the image has another shape, or the logits have another size than their image, only one class, or
            values that are not finite.

    Source: `EncoderDecoder.slide_inference` and `SegTTAModel` of mmsegmentation 1.2.2 define the published rules.
    """
    inference = inference or Inference()
    if image.ndim != 4 or len(image) != 1:
        raise UserError(
            f"predict: one image has the shape (1, 3, H, W); got {tuple(image.shape)}. Pass images one by one."
        )
    H, W = image.shape[-2:]
    mean: Tensor | None = None
    for scale in inference.scales:
        scaled = _resize(image, (max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))))
        for mirrored in (False, True) if inference.flip else (False,):
            logits = _logits(model, scaled.flip(-1) if mirrored else scaled, inference)
            logits = _resize(logits.flip(-1) if mirrored else logits, size or (H, W))
            probabilities = logits[0].softmax(0)
            mean = probabilities if mean is None else mean.add_(probabilities)
    assert mean is not None
    return mean.div_(len(inference.scales) * (1 + inference.flip))


def windows(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the windows that cover an image of `size` pixels.

    The last window of a row or column is shifted back into the image. Where the image is smaller than the window, the
    window is as small as the image.
    """
    for top in _starts(size[0], window[0], stride[0]):
        for left in _starts(size[1], window[1], stride[1]):
            yield slice(top, min(top + window[0], size[0])), slice(left, min(left + window[1], size[1]))


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def _logits(model: Callable[[Tensor], Tensor], image: Tensor, inference: Inference) -> Tensor:
    """Return the logits of an image, (1, K, H, W), float32."""
    if not inference.slide:
        return _checked(model(image), image)
    H, W = image.shape[-2:]
    counts = image.new_zeros(H, W, dtype=torch.float32)
    total: Tensor | None = None
    for rows, columns in windows((H, W), inference.window, inference.stride):
        part = image[..., rows, columns]
        logits = _checked(model(part), part)
        total = logits.new_zeros(1, logits.shape[1], H, W) if total is None else total
        total[..., rows, columns] += logits
        counts[rows, columns] += 1
    assert total is not None
    return total.div_(counts)


def _checked(logits: Tensor, image: Tensor) -> Tensor:
    if logits.ndim != 4 or logits.shape[-2:] != image.shape[-2:] or logits.shape[1] < 2:
        raise UserError(
            f"predict: a model gives logits (1, K, {image.shape[-2]}, {image.shape[-1]}) of at least 2 classes at the "
            f"size of its image; got {tuple(logits.shape)}. Resize them in the model."
        )
    if not logits.isfinite().all():
        raise UserError("predict: logits are finite numbers; got NaN or infinity. Try float32, or another checkpoint.")
    return logits.float()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
