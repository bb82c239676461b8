"""Necks: from maps with one stride to maps with several strides, as dense heads read them.

`MultiScale` serves segmentation, `SimpleFeaturePyramid` detection. A neck turns a list of maps into another list, the
finest first. Its `channels` and `strides` describe the maps that it returns. A map with h rows and stride s covers
h * s pixels, those of the padding included, and so do the maps of a neck.

B images, D channels, s stride
"""

from collections.abc import Callable, Sequence

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.pyramid import doubled, pyramid_levels

_LEVELS = 4  # maps that a segmentation head reads


class MultiScale(nn.Module):
    """Turn four maps with one stride s into maps with four strides, for segmentation: 4, 8, 16 and 32 for s = 16 or 8.

    The first map is doubled twice for s = 16 and above, once from s = 8 on, and not at all for smaller strides. Each
    further map is doubled once less. A map that is doubled less than zero times is the maximum of 2 x 2 positions, of
    4 x 4, and so on, where the last row and column may hold fewer. All maps keep D channels.

    Args:
        channels: D of each of the four maps.
        strides: s of each map, the same number four times.
        norm_layer: Function that takes D and returns the norm between two doublings.

    Attributes:
        channels, strides: Channels and stride in pixels of each map.

    Raises:
        ValueError: If there are not four maps, if their strides differ, or if a doubled map has no whole stride.

    Source: Bao et al., "BEiT" (arXiv:2106.08254), and its segmentation code; Vim's dense code has the same rule.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if len(strides) != _LEVELS or len(set(strides)) > 1:
            raise UserError(
                f"MultiScale: four maps with one stride become maps with four strides; got strides {list(strides)}. "
                "Take four blocks, e.g. taps.indices [2, 5, 8, 11]."
            )
        stride = strides[0]
        doublings = 2 if stride >= 16 else 1 if stride >= 8 else 0
        if stride % 2**doublings:
            raise UserError(
                f"MultiScale: a map with stride {stride} is doubled {doublings} times, and {stride} / {2**doublings} "
                "is no whole number of pixels. Choose an encoder with another patch size."
            )
        self.channels = list(channels)
        self.strides = [stride * 2**level // 2**doublings for level in range(_LEVELS)]
        self.scales = nn.ModuleList(
            _scaled(width, doublings - level, norm_layer) for level, width in enumerate(channels)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the four maps, finest first, of four maps (B, D, h, w)."""
        return [scale(one) for scale, one in zip(self.scales, maps, strict=True)]


class SimpleFeaturePyramid(nn.Module):
    """Turn one map with stride s into maps with strides s/4, s/2, s, 2s and 4s, for detection.

    The first four are the levels of `SimplePyramid`; each then passes a 1 x 1 and a 3 x 3 convolution, each with a
    LayerNorm of the channels and without an activation. The fifth is every second position of the fourth. There is no
    path from coarse to fine maps.

    Args:
        channels: D.
        stride: s in pixels.
        out_channels: Channels of every map.

    Attributes:
        channels, strides: Channels and stride in pixels of each of the five maps.

    Raises:
        ValueError: If the stride or D is no multiple of 4.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527), sec. 3.
    """

    def __init__(self, channels: int, stride: int, out_channels: int = 256) -> None:
        super().__init__()
        levels = pyramid_levels("SimpleFeaturePyramid", channels, stride, ceil_mode=True)
        self.channels = [out_channels] * (len(levels) + 1)
        self.strides = [*(level.stride for level in levels), 4 * stride]
        self.levels = nn.ModuleList(level.module for level in levels)
        self.outputs = nn.ModuleList(_projected(level.channels, out_channels) for level in levels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the five maps, finest first, of a list with one map (B, D, h, w)."""
        (only,) = maps
        pyramid = [output(level(only)) for level, output in zip(self.levels, self.outputs, strict=True)]
        return [*pyramid, pyramid[-1][..., ::2, ::2]]


def _scaled(width: int, doublings: int, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    """Return the module that doubles a map `doublings` times; it halves the map if the number is negative."""
    if doublings > 1:
        return nn.Sequential(doubled(width, width), norm_layer(width), nn.GELU(), doubled(width, width))
    if doublings == 1:
        return doubled(width, width)
    return nn.MaxPool2d(2**-doublings, ceil_mode=True) if doublings else nn.Identity()


def _projected(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, outputs, 1, bias=False),
        LayerNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        LayerNorm2d(outputs),
    )
