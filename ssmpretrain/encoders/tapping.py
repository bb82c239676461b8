"""Base class of the part of a family that serves dense tasks: maps after some blocks, of images of any size.

B images, H x W pixels, C channels, s stride of a map
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError


class Tapping:
    """Read maps of an encoder by the interface of timm's encoders. `Family` inherits from this class.

    The defaults serve every encoder with timm's methods `forward_intermediates` and `prune_intermediate_layers` and its
    attribute `feature_info`. The number of a tap is an index into `feature_info`: a block of an encoder with one
    stride, a stage of a pyramid.

    Attributes:
        tap_norm: Default norm of the maps, as in `Taps`.
        tap_class_token: Whether the blocks can run with class tokens, without them, or either way, the default first.
    """

    tap_norm: ClassVar[str] = "none"
    tap_class_token: ClassVar[tuple[bool, ...]] = (True,)

    def accept_any_size(self, encoder: Any) -> None:
        """Let an encoder that is already built read images of any size that `tap_size` returns, in place.

        The default changes nothing. If timm says that the encoder has a fixed image size, it tries a small image.

        Raises:
            ValueError: If the encoder takes only images of the size that it was built for.
        """
        if not getattr(encoder, "pretrained_cfg", {}).get("fixed_input_size"):
            return
        try:
            self._try(encoder, (64, 96))
        except Exception as error:  # timm and torch raise different errors here
            raise UserError(
                f"taps: an encoder reads images of any size; {type(encoder).__name__} fails with images of other sizes "
                f"than the one it was built for ({str(error).splitlines()[0]:.120}). Build it with "
                "encoder_args.dynamic_img_size true if it has this argument, or choose another encoder."
            ) from error

    def _try(self, encoder: Any, size: tuple[int, int]) -> None:
        weight, was_training = next(encoder.parameters()), encoder.training
        channels = getattr(encoder, "in_chans", 3)
        image = weight.new_zeros(1, channels, *self.tap_size(encoder, size))
        with torch.no_grad():
            encoder.eval().forward_intermediates(image, intermediates_only=True)
        encoder.train(was_training)

    def tap_reads(self, encoder: Any) -> tuple[str, ...]:
        """Return the places in a block that a tap can read, see `Taps`."""
        return ("stream",)

    def tap_size(self, encoder: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) to which an image of (height, width) is padded at the right and below.

        The map of a tap then has at least ceil(H / s) rows and ceil(W / s) columns. The default pads to multiples of
        the largest stride.
        """
        stride = max(info["reduction"] for info in encoder.feature_info)
        return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride

    def tap(
        self, encoder: Any, images: Tensor, indices: Sequence[int], *, read: str, norm: bool, class_token: bool
    ) -> list[Tensor]:
        """Return the maps of some taps, each (B, C, h, w), in the order of their indices.

        Args:
            encoder: The encoder.
            images: Images, (B, 3, H, W), of a size that `tap_size` returns.
            indices: Numbers of the taps, ascending.
            read: One of `tap_reads`.
            norm: Whether to apply the encoder's final norm: to every map of an encoder with one stride, to the last
                map of a pyramid.
            class_token: Whether class tokens are in the sequence while the blocks run; one of `tap_class_token`.
        """
        maps: list[Tensor] = encoder.forward_intermediates(
            images, indices=list(indices), norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps

    def unread(
        self, encoder: nn.Module, indices: Sequence[int], *, norm: bool, class_token: bool
    ) -> list[nn.Parameter]:
        """Return the parameters that the maps of some taps do not depend on: later blocks, final norm, pooling, head.

        Args:
            encoder: The encoder. It is not changed.
            indices, norm, class_token: As in `tap`.
        """
        shared = {id(parameter): parameter for parameter in encoder.parameters()}
        pruned: Any = copy.deepcopy(encoder, dict(shared))  # other modules, the same parameters
        pruned.prune_intermediate_layers(list(indices), prune_norm=not norm, prune_head=True)
        read = {id(parameter) for parameter in pruned.parameters()}
        return [parameter for key, parameter in shared.items() if key not in read]
