"""Changes of the colours of an image, in place on float tensors: jitter, gray, Gaussian blur, solarising.

An image is (3, H, W), float32, RGB, with whole numbers from 0 to 255; so it is after each change. Each result is that
of `torchvision.transforms.v2.functional` on uint8: exactly, or for `turn_hue` and `blur` up to one level in fewer than
one value of 5000. docs/benchmarks.md compares the times: together the changes take a third of torchvision's.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_REACH = 4  # in standard deviations; the weights beyond add up to less than 1e-4


def scale_brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply all values by a factor of at least 0."""
    return image.mul_(factor).clamp_(0, 255).floor_()


def scale_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply the distance from the mean gray level by a factor of at least 0."""
    mean = _gray(image).mean().view(1, 1, 1)
    return _blend(image, mean, factor)


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the distance from the gray image by a factor of at least 0."""
    return _blend(image, _gray(image), factor)


def turn_hue(image: Tensor, turns: float) -> Tensor:
    """Turn the hue by a fraction of the circle, from -1/2 to 1/2; value and saturation in HSV stay.

    The largest and the smallest value of each pixel stay, so its chroma c and lowest value l do too. With the new hue h
    in [0, 6), red is l + c clamp(|h - 3| - 1, 0, 1); green and blue are l + c clamp(2 - |h - k|, 0, 1), k = 2 and 4.
    """
    red, green, blue = image.unbind()
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    is_red = torch.eq(red, high, out=torch.empty_like(red))  # as float; a boolean mask takes seven times as long
    is_green = torch.eq(green, high, out=torch.empty_like(green))
    hue = (red - green).add_(chroma, alpha=4)
    hue.lerp_((blue - red).add_(chroma, alpha=2), is_green).lerp_(green - blue, is_red)
    hue.div_(chroma.clamp_min(1)).add_(6 * turns)  # a gray pixel has chroma 0 and any hue
    hue.sub_(torch.floor(hue / 6), alpha=6)
    torch.sub(hue, 3, out=red).abs_().sub_(1)
    torch.sub(hue, 2, out=green).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=blue).abs_().neg_().add_(2)
    image.clamp_(0, 1).mul_(chroma).add_(low)
    return image.mul_(255.999 / 255).floor_()  # torchvision's rounding of a fraction x to a level: floor(255.999 x)


def make_gray(image: Tensor) -> Tensor:
    """Give the three channels the gray level 0.2989 R + 0.587 G + 0.114 B, rounded down."""
    return image.copy_(_gray(image))


def blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian of standard deviation `sigma` in pixels; the image is reflected at its borders.

    The kernel reaches 4 sigma, which is as small as this sigma allows. It is separable, so a sum of shifted columns and
    one of shifted rows take its place: a quarter of the time of a convolution in two dimensions.
    """
    reach = min(
        math.ceil(_REACH * sigma), image.shape[1] - 1, image.shape[2] - 1
    )  # a reflection is shorter than a side
    weights = [math.exp(-0.5 * k / sigma * k / sigma) for k in range(reach + 1)]
    total = 2 * sum(weights) - weights[0]
    padded = F.pad(image, [reach] * 4, mode="reflect")
    columns = _weighted_sum(padded, [weight / total for weight in weights], dim=1)
    return image.copy_(_weighted_sum(columns, [weight / total for weight in weights], dim=2)).round_()


def solarize(image: Tensor) -> Tensor:
    """Replace each value x of at least 128 by 255 - x."""
    return image.sub_(127.5).abs_().neg_().add_(127.5)


def _gray(image: Tensor) -> Tensor:
    red, green, blue = image.split(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(image: Tensor, other: Tensor, factor: float) -> Tensor:
    return image.mul_(factor).add_(other, alpha=1 - factor).clamp_(0, 255).floor_()


def _weighted_sum(padded: Tensor, weights: list[float], dim: int) -> Tensor:
    """Convolve one axis of a padded image with a symmetric kernel, of which the middle and one side are given."""
    reach, length = len(weights) - 1, padded.shape[dim] - 2 * (len(weights) - 1)
    result = padded.narrow(dim, reach, length) * weights[0]
    for shift in range(1, reach + 1):
        for start in (reach - shift, reach + shift):
            result.add_(padded.narrow(dim, start, length), alpha=weights[shift])
    return result
