"""The base class of heads, and layers that several heads have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.settings import Settings


@dataclass
class Head(Settings):
    """Base class of the settings of a head. Subclasses are dataclasses of plain data, and define `build`.

    Attributes:
        reads_pyramid: Whether the head reads several maps, finest first. Otherwise it reads one map.
    """

    reads_pyramid: ClassVar[bool] = True

    @abstractmethod
    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        """Build the head. It turns a list of maps (B, C_i, h_i, w_i), finest first, into logits (B, K, h_0, w_0).

        Args:
            channels: C_i of each map.
            num_classes: K.
        """


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of maps (B, C, h, w). A single value of a channel has no deviation and is refused."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            raise UserError(
                "head: batch normalisation needs 2 values or more of each channel in training; got 1 image whose map "
                "has 1 position, as the mean over the whole map has. Raise data.batch_size to 2 or more on each device."
            )
        return super().forward(input)


def conv_norm_relu(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution that keeps the size of the map, batch normalisation and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(outputs), nn.ReLU())


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution to logits, with weights from N(0, 0.01) and biases 0, as in mmsegmentation."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def check_sizes(where: str, dropout: float, **sizes: int) -> None:
    """Raise a UserError if a number of channels, layers or heads is below 1, or `dropout` is no fraction below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{where}: {name} is at least 1; got {size}. Correct it.")
    if not 0 <= dropout < 1:
        raise UserError(f"{where}: dropout is a fraction in [0, 1); got {dropout}. 0.1 is usual.")
