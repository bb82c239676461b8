"""Base class of the part of a family that serves dense tasks: maps after some blocks, of images of any size.

B images, H x W pixels, C channels, s stride of a map
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.models import get_model_input_config
from torch import Tensor


class Tapping:
    """Read maps of an encoder by the interface of timm's encoders. `Family` inherits from this class.

    The defaults serve every encoder with timm's method `forward_intermediates` and attribute `feature_info`. The number
    of a tap is an index into `feature_info`: a block of an encoder with one stride, a stage of a pyramid.

    Attributes:
        tap_norm: Default norm of the maps, as in `Taps`.
        tap_class_token: Whether the blocks can run with class tokens, without them, or either way, the default first.
    """

    tap_norm: ClassVar[str] = "none"
    tap_class_token: ClassVar[tuple[bool, ...]] = (True,)

    def accept_any_size(self, encoder: Any) -> None:
        """Let an encoder that is already built read images of other sizes too, in place.

        Images of its own size give the same features as before, and the names and shapes of its tensors stay. The
        default changes nothing.
        """

    def prepare_taps(self, encoder: Any) -> None:
        """Let an encoder that is already built give maps of images of any size that `tap_size` returns, in place.

        `TappedEncoder` then tries a small image. The default is `accept_any_size`.
        """
        self.accept_any_size(encoder)

    def view_sides(self, encoder: Any) -> tuple[int, int] | None:
        """Return the smallest side of an image in pixels, and the step from it to the next larger side that fits.

        A side fits if positions of the last map cover it exactly. A step of 0 means that only this side fits. The
        result is None if no rule is known. The default is the image size of an encoder that timm's configuration calls
        fixed, else None.
        """
        config = get_model_input_config(encoder)
        height, width = config["input_size"][1:]
        return (height, 0) if config["fixed_input_size"] and height == width else None

    def tap_reads(self, encoder: Any) -> tuple[str, ...]:
        """Return the places in a block that a tap can read, see `Taps`."""
        return ("stream",)

    def tap_class_token_of(self, encoder: Any) -> tuple[bool, ...]:
        """Return the choices of `Taps.class_token` for an encoder, the default first. They are `tap_class_token`."""
        return self.tap_class_token

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
