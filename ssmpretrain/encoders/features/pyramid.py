"""Pyramid of maps at four strides, made from the last map of an encoder with one stride, for dense tasks.

D channels, s stride
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from timm.layers.norm import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import last_map, take_indices


class Level(NamedTuple):
    """One level of a pyramid.

    Attributes:
        channels: Channels of the map.
        stride: Stride of the map in pixels.
        module: Module that makes the map from the map of the encoder.
    """

    channels: int
    stride: int
    module: nn.Module


class SimplePyramid(nn.Module):
    """Turn the last map of an encoder into maps with strides s/4, s/2, s and 2s, and D/4, D/2, D and D channels.

    The two finer maps come from transposed convolutions with random initial weights. The coarsest map is the maximum of
    2 x 2 positions. The class takes the place of timm's wrapper for `features_only`.

    Args:
        model: An encoder that keeps an image as one sequence of patches. Its head is removed.
        out_indices: Indices of the maps to return; 0 is the finest. A number n takes the n coarsest.

    Raises:
        ValueError: If the stride or D is no multiple of 4, or an index is out of range.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527), sec. 3,
        without the convolutions that give all maps the same number of channels; in the paper they belong to the head.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        encoder = cast(Any, model)
        levels = pyramid_levels("SimplePyramid", encoder.embed_dim, encoder.patch_embed.stride)
        indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
        take, _ = take_indices("SimplePyramid", "levels", len(levels), indices)
        self.model = model
        encoder.reset_classifier(0)
        self.levels = nn.ModuleDict({str(index): levels[index].module for index in take})
        info = [
            {"num_chs": level.channels, "reduction": level.stride, "module": f"levels.{index}"}
            for index, level in enumerate(levels)
        ]
        self.feature_info = FeatureInfo(info, tuple(take))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of images, (B, C, height, width), in the order of `out_indices`."""
        final = last_map(self.model, images)
        return [level(final) for level in self.levels.values()]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of the encoder on or off; see `BlockStack.set_grad_checkpointing`."""
        cast(Any, self.model).set_grad_checkpointing(enable)


def pyramid_levels(where: str, width: int, stride: int, ceil_mode: bool = False) -> list[Level]:
    """Build the modules that turn a map (B, D, h, w) with stride s into maps with strides s/4, s/2, s and 2s.

    Args:
        where: Name of the caller, used in the error message.
        width: D.
        stride: s in pixels.
        ceil_mode: Round the number of rows and columns of the coarsest map up instead of down.

    Raises:
        ValueError: If the stride or D is no multiple of 4.
    """
    if width % 4 or stride % 4:
        raise UserError(
            f"{where}: the map is doubled twice, so its stride and channels are multiples of 4; got stride "
            f"{stride} and {width} channels. Choose another encoder, or for timm's features_only feature_cls='getter'."
        )
    half, quarter = width // 2, width // 4
    twice = nn.Sequential(doubled(width, half), LayerNorm2d(half), nn.GELU(), doubled(half, quarter))
    return [
        Level(quarter, stride // 4, twice),
        Level(half, stride // 2, doubled(width, half)),
        Level(width, stride, nn.Identity()),
        Level(width, 2 * stride, nn.MaxPool2d(2, ceil_mode=ceil_mode)),
    ]


def doubled(channels: int, outputs: int) -> nn.Module:
    """Return the transposed convolution that doubles the rows and columns of a map."""
    return nn.ConvTranspose2d(channels, outputs, kernel_size=2, stride=2)
