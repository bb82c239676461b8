"""Checks of the arguments of encoders in stages and of the images that they read."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, check_widths
from ssmpretrain.encoders.sequence.patch_embed import checked_pixels

GlobalPool = Literal["avg", "max", ""]
GLOBAL_POOLS: tuple[str, ...] = get_args(GlobalPool)


def dims_of(embed_dim: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Return the number of channels of each stage; a single number doubles from stage to stage."""
    return [embed_dim * 2**stage for stage in range(len(depths))] if isinstance(embed_dim, int) else [*embed_dim]


def check_sizes(
    where: str, dims: list[int], depths: Sequence[int], ssm_ratio: float, d_conv: int, **counts: int | str
) -> None:
    """Raise a ValueError if a size is out of range.

    Args:
        where: Name of the encoder, used in the error message.
        dims: Number of channels of each stage.
        depths: Number of blocks of each stage.
        ssm_ratio: Inner channels of the mixer per channel of the stage.
        d_conv: Side of the mixer's convolution.
        counts: Other arguments that are numbers, by name. "auto" is allowed for dt_rank.
    """
    counts["d_conv"] = d_conv
    if not dims or len(dims) != len(depths):
        raise UserError(f"{where}: embed_dim and depths name one number per stage; got {dims} and {list(depths)}.")
    for name, numbers in {"embed_dim": dims, "depths": depths, **{name: [n] for name, n in counts.items()}}.items():
        if any(isinstance(number, int) and number < 1 for number in numbers):
            raise UserError(f"{where}: {name} is at least 1; got {numbers[0] if name in counts else list(numbers)}.")
    if isinstance(counts.get("dt_rank"), str) and counts["dt_rank"] != "auto":
        raise UserError(f"{where}: dt_rank is a number or 'auto'; got {counts['dt_rank']!r}.")
    if not d_conv % 2:
        raise UserError(f"{where}: d_conv is odd, so that the map keeps its size; got {d_conv}.")
    if sum(depths) > MOST_BLOCKS:
        raise UserError(f"{where}: depths are at most {MOST_BLOCKS} blocks in all; got {list(depths)}.")
    check_widths(where, embed_dim=max(dims), **{name: n for name, n in counts.items() if isinstance(n, int)})
    if not 1 <= ssm_ratio * min(dims) < math.inf:
        raise UserError(f"{where}: ssm_ratio * embed_dim is finite and at least 1; got {ssm_ratio} * {min(dims)}.")
    check_widths(where, **{"ssm_ratio * embed_dim": ssm_ratio * max(dims)})


def check_fractions(where: str, mlp_ratio: float, drop_rate: float, drop_path_rate: float) -> None:
    """Raise a ValueError if a ratio or a rate is out of range."""
    if not 0 <= mlp_ratio < math.inf:
        raise UserError(f"{where}: mlp_ratio is finite and at least 0; got {mlp_ratio}.")
    for name, rate in {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}.items():
        if not 0 <= rate < 1:
            raise UserError(f"{where}: {name} is in [0, 1); got {rate}.")


def checked_pool(where: str, global_pool: str) -> str:
    """Return the word for the pooling unchanged; raise a ValueError unless it is "avg", "max" or ""."""
    if global_pool not in GLOBAL_POOLS:
        raise UserError(f"{where}: global_pool is one of avg, max or empty; got {global_pool!r}.")
    return global_pool


def checked_large_pixels(where: str, images: Tensor, in_chans: int, min_size: int) -> Tensor:
    """Return the images unchanged, or raise a ValueError if the encoder cannot read them.

    Args:
        where: Name of the encoder, used in the error message.
        images: Images, (B, in_chans, height, width), floating-point.
        in_chans: Number of channels that the encoder reads.
        min_size: Smallest height and width in pixels.
    """
    images = checked_pixels(images, where, in_chans)
    if min(images.shape[2:]) < min_size:
        raise UserError(
            f"{where}: an image has at least {min_size} x {min_size} pixels; "
            f"got {images.shape[2]} x {images.shape[3]} (height x width). Resize it."
        )
    return images
