"""Pyramid of maps at four strides, made from an encoder with one stride, for dense tasks.

D channels, s stride
"""

from collections.abc import Sequence
from typing import Any, cast

from timm.layers.norm import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import last_map, take_indices


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
        width, stride = encoder.embed_dim, encoder.patch_embed.stride
        if width % 4 or stride % 4:
            raise UserError(
                f"SimplePyramid: the map is doubled twice, so its stride and channels are multiples of 4; got stride "
                f"{stride} and {width} channels. Choose another encoder, or feature_cls='getter'."
            )
        half, quarter = width // 2, width // 4
        twice = nn.Sequential(_doubled(width, half), LayerNorm2d(half), nn.GELU(), _doubled(half, quarter))
        levels: list[tuple[int, int, nn.Module]] = [
            (quarter, stride // 4, twice),
            (half, stride // 2, _doubled(width, half)),
            (width, stride, nn.Identity()),
            (width, 2 * stride, nn.MaxPool2d(2)),
        ]
        indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
        take, _ = take_indices("SimplePyramid", "levels", len(levels), indices)
        self.model = model
        encoder.reset_classifier(0)
        self.levels = nn.ModuleDict({str(index): levels[index][2] for index in take})
        info = [
            {"num_chs": channels, "reduction": reduction, "module": f"levels.{index}"}
            for index, (channels, reduction, _) in enumerate(levels)
        ]
        self.feature_info = FeatureInfo(info, tuple(take))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of images, (B, C, height, width), in the order of `out_indices`."""
        final = last_map(self.model, images)
        return [level(final) for level in self.levels.values()]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of the encoder on or off; see `BlockStack.set_grad_checkpointing`."""
        cast(Any, self.model).set_grad_checkpointing(enable)


def _doubled(channels: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, outputs, kernel_size=2, stride=2)
