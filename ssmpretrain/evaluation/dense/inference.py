"""Class probabilities of an image of any size: whole or in sliding windows, at several scales, with its mirror image.

Legend: K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError

_STRIP = 2**24  # probabilities at a time: 64 MiB


@dataclass(frozen=True)
class Inference:
    """Settings of `predict`. The defaults give the model the whole image once.

    Args:
        slide: Whether the model gets windows of the image instead of the whole image.
        window: Height and width of a window in pixels; published: 512, 512.
        stride: Steps between windows in pixels, down and to the right; at most the window. Published: 341, 341.
        scales: The image is resized by each of these ratios. Published for "multi-scale": 0.5, 0.75, 1, 1.25, 1.5,
            1.75, with flip.
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
        pairs = list(zip(self.stride, self.window, strict=False))
        if len(self.window) != 2 or len(self.stride) != 2 or not all(1 <= stride <= window for stride, window in pairs):
            raise UserError(
                f"Inference: stride and window are (height, width) in pixels, and 1 <= stride <= window; got stride "
                f"{self.stride} and window {self.window}. 341 and 512 are usual."
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
    averaged. Windows average logits, before the softmax. Resizing is bilinear, without smoothing.

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
    height, width = size or image.shape[-2:]
    return _mean_probabilities(_passes(model, image, inference or Inference()), (height, width), 0, height)


def predict_classes(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    inference: Inference | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Predict the likeliest class at each pixel, the argmax of `predict`, without holding all probabilities at once.

    The probabilities of 150 classes at the 12 million pixels of a photograph take 7 GB. This function resizes the
    logits and computes probabilities in strips of rows, so it needs the memory of the logits at the size of the image.

    Args:
        model, image, inference, size: As in `predict`.

    Returns:
        Classes (height, width), int64, on the device of the image.

    Raises:
        UserError: As `predict`.
    """
    height, width = size or image.shape[-2:]
    passes = _passes(model, image, inference or Inference())
    step = max(1, _STRIP // (passes[0].shape[1] * width))
    strips = [
        _mean_probabilities(passes, (height, width), top, min(top + step, height)).argmax(0)
        for top in range(0, height, step)
    ]
    return torch.cat(strips)


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


def _passes(model: Callable[[Tensor], Tensor], image: Tensor, inference: Inference) -> list[Tensor]:
    """Return the logits of every scale, and of its mirror image turned back, each (1, K, h, w)."""
    if image.ndim != 4 or len(image) != 1:
        raise UserError(
            f"predict: one image has the shape (1, 3, H, W); got {tuple(image.shape)}. Pass images one by one."
        )
    H, W = image.shape[-2:]
    passes = []
    for scale in inference.scales:
        scaled = _resize(image, (max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))))
        passes.append(_logits(model, scaled, inference))
        if inference.flip:
            passes.append(_logits(model, scaled.flip(-1), inference).flip(-1))
    return passes


def _mean_probabilities(passes: Sequence[Tensor], size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Resize the logits to `size`, and return the mean of their softmax in the rows from `top` to `bottom`."""
    mean: Tensor | None = None
    for logits in passes:
        rows = _rows(logits, size[0], top, bottom)
        probabilities = _resize(rows, (bottom - top, size[1]))[0].softmax(0)
        mean = probabilities if mean is None else mean.add_(probabilities)
    assert mean is not None
    return mean.div_(len(passes))


def _rows(maps: Tensor, height: int, top: int, bottom: int) -> Tensor:
    """Resize the rows of maps (1, K, h, w) to `height`, bilinearly, and keep those from `top` to `bottom`."""
    h = maps.shape[-2]
    if h == height:
        return maps[..., top:bottom, :]
    centre = (torch.arange(top, bottom, device=maps.device) + 0.5) * (h / height) - 0.5  # align_corners=False
    centre = centre.clamp(0, h - 1)
    above = centre.long()
    below = (above + 1).clamp_max(h - 1)
    return torch.lerp(maps[..., above, :], maps[..., below, :], (centre - above).unsqueeze(-1))


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
