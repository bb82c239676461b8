"""Patch embedding: project the patches of an image, and check sizes of images.

B batch, H x W patches, D channels
"""

from typing import cast

from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import check_widths


def checked_pixels(images: Tensor, where: str, in_chans: int) -> Tensor:
    """Return the images unchanged, or raise a ValueError if an encoder cannot read them.

    Args:
        images: Images, (B, in_chans, height, width), floating-point.
        where: Name of the encoder, used in the error message.
        in_chans: Number of channels that the encoder reads.

    Raises:
        ValueError: If the images have another shape or are not floating-point.
    """
    if images.ndim != 4 or images.shape[1] != in_chans or not images.is_floating_point():
        raise UserError(
            f"{where}: images are floating-point (batch, {in_chans}, height, width); "
            f"got {images.dtype} {tuple(images.shape)}. Convert to float and normalise, or set in_chans."
        )
    return images


def grid_of(img_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of patches in an image of (height, width) pixels.

    Args:
        img_size: (height, width) in pixels.
        patch_size: Side of a patch in pixels.
        stride: Distance between neighbouring patches in pixels.

    Raises:
        ValueError: If a side is smaller than a patch, or if the patches do not fill it exactly.
    """
    for side, pixels in zip(("height", "width"), img_size, strict=True):
        if pixels < patch_size or (pixels - patch_size) % stride:
            below = patch_size + max((pixels - patch_size) // stride, 0) * stride
            nearest = f"{below} or {below + stride}" if below < pixels else f"{below}"
            step = "" if stride == patch_size else f" every {stride} pixels"
            raise UserError(
                f"PatchEmbed: patches of {patch_size} x {patch_size} pixels{step} must fill the image "
                f"exactly; got an image of {img_size[0]} x {img_size[1]} (height x width). "
                f"Resize or crop its {side} from {pixels} to {nearest} pixels."
            )
    height, width = ((pixels - patch_size) // stride + 1 for pixels in img_size)
    return height, width


class PatchEmbed(nn.Module):
    """Project the square patches of images, (B, C, height, width) to (B, H * W, D), in raster order.

    Args:
        img_size: Size of the images in pixels, one number or (height, width).
        patch_size: Side of a patch in pixels.
        stride: Distance between neighbouring patches in pixels.
        in_chans: Channels of the images.
        embed_dim: D.

    Raises:
        ValueError: If a number is out of range, or if the patches do not fill an image of `img_size` exactly.
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int
    ) -> None:
        super().__init__()
        for name, value in {"patch_size": patch_size, "stride": stride, "in_chans": in_chans}.items():
            if value < 1:
                raise UserError(f"PatchEmbed: {name} is at least 1; got {value}. Give a larger one.")
        check_widths("PatchEmbed", patch_size=patch_size, stride=stride, in_chans=in_chans)
        self.patch_size = patch_size
        self.stride = stride
        self.in_chans = in_chans
        self.img_size = to_height_width(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)
        lecun_normal_(self.proj.weight)  # type: ignore[no-untyped-call]
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches in an image of (height, width) pixels.

        Raises:
            ValueError: If a side is smaller than a patch, or if the patches do not fill it exactly.
        """
        return grid_of(img_size, self.patch_size, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def to_height_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return an image size as the pair (height, width) in pixels.

    Args:
        img_size: The pair, or one number for both sides.

    Raises:
        ValueError: If `img_size` is neither a number above 0 nor a pair of such numbers, or is above 16,384.
    """
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(
            f"PatchEmbed: img_size is one number of pixels or (height, width); got {img_size!r}. Give at least 1."
        )
    check_widths("PatchEmbed", img_size=max(pair))
    return pair[0], pair[1]
