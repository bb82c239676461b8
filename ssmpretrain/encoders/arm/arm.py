"""Encoder of ARM, called MambaMLP: Mamba mixers and gated MLPs on one sequence of patches.

Attributes have the names of the official state dicts, so published weights load without renaming.

Source: Ren et al., "Autoregressive Pretraining with Mamba in Vision" (arXiv:2406.07537).

    B batch, M = h x w patches, L tokens (the patches and, with four directions, a class token in their middle),
    D channels
"""

import math
from typing import Any, Literal, cast

import torch.fx
import torch.nn.functional as F
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.layers.fx_tracing import one_node
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, LayerNorm, add_branch, check_widths
from ssmpretrain.encoders.sequence.class_token import insert_class_tokens, remove_class_tokens
from ssmpretrain.encoders.sequence.encoder import PosEmbed, SequenceEncoder
from ssmpretrain.encoders.sequence.head import GlobalPool
from ssmpretrain.encoders.vim.mixer import VimMixer

Directions = Literal[1, 4]


class ARMMixer(VimMixer):
    """Mix tokens, (B, L, D) to (B, L, D), by one causal scan or by four scans.

    The four scans go along the rows and along the columns, forward and backward. Each of them has its own convolution,
    projections, decay and skip, and their outputs are averaged. In a scan along columns the class token stays in the
    middle.

    Args:
        dim: D, also the number of channels inside the mixer.
        d_state: N, states per channel.
        directions: Number of scans, 1 or 4.

    Source: Ren et al. (arXiv:2406.07537), section 3.2, and its code.
    """

    def __init__(self, dim: int, d_state: int, directions: Directions) -> None:
        kind = "none" if directions == 1 else "ssm_conv"
        super().__init__(dim, d_state, expand=1, bidirectional=kind, divide_output=False)
        if directions == 4:
            self._add_direction("_c")
            self._add_direction("_c_b")
            self.init_state_space()

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        if len(self.directions) == 1:
            return super().forward(x)
        assert grid_size is not None
        xz = self.in_proj(x)
        rows = self.scan(xz, "", "_b")
        columns = self.scan(transpose_grid(xz, grid_size), "_c", "_c_b")
        return self.out_proj((rows + transpose_grid(columns, grid_size[::-1])) / 4)  # type: ignore[no-any-return]


def transpose_grid(sequence: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Reorder tokens, (B, h w + 1, D), from row by row to column by column; the class token stays in the middle.

    Args:
        sequence: h w patches in raster order, with a class token in the middle.
        grid_size: (h, w), numbers of rows and columns of patches.
    """
    patches, class_token = remove_class_tokens(sequence, "middle")
    columns = patches.reshape(patches.shape[0], *grid_size, -1).transpose(1, 2).flatten(1, 2)
    return insert_class_tokens(columns, class_token, "middle")


class SwiGLU(nn.Module):
    """Compute w3(silu(w1 x) * w2 x), (..., D) to (..., D); w1 and w2 have 8/3 D outputs, and all three have a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * 8 // 3
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)
        for layer in (self.w1, self.w2, self.w3):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))  # type: ignore[no-any-return]


class ARMBlock(nn.Module):
    """Compute x + mixer(norm1(x)), then x + mlp(norm2(x)), of tokens (B, L, D); the sums stay in float32 or float64."""

    def __init__(self, dim: int, d_state: int, directions: Directions, drop_path: float) -> None:
        super().__init__()
        self.mixer = ARMMixer(dim, d_state, directions)
        self.mlp = SwiGLU(dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x, grid_size)  # type: ignore[no-any-return]
        x = add_branch(self.drop_path(self.mixer(self.norm1(x), grid_size)), x)
        return add_branch(self.drop_path(self.mlp(self.norm2(x))), x)


class ARMEncoder(SequenceEncoder):
    """Encode an image by MambaMLP: every block has a Mamba mixer and a gated MLP.

    It is pretrained with one direction of scan and fine-tuned with four.

    Args:
        img_size: Size of the images in pixels, one number or (height, width). The position embedding has one row for
            each patch of such an image; it is resized for images of other sizes.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Tokens that the head reads. "avg" (published): the mean of the patch tokens. "token", "max" and "":
            as in `Vim`. The scans always include the class token.
        directions: Number of scans in a block. 4 (published for fine-tuning): along rows and columns, forward and
            backward, with a class token in the middle. 1 (published for pretraining): forward along rows, without a
            class token, so that a token depends only on itself and on the tokens before it.
        embed_dim: D.
        depth: Number of blocks.
        d_state: N, states per channel.
        drop_rate: Dropout on the embedded tokens, in [0, 1).
        drop_path_rate: Stochastic depth rate, in [0, 1). It rises linearly with the blocks. As published, each block
            has the rate of the block before it, so the last block has less than this rate.
        pos_embed: "learned", or "sincos" for the fixed sine-cosine table. None means the published choice: "sincos"
            with one direction and "learned" with four.

    New step sizes are drawn as in Mamba for all directions. In the published code the forward direction starts so, and
    the others start at softplus(0). The difference matters only for training from scratch, because pretrained weights
    replace these values.

    Raises:
        ValueError: If an argument is out of range or not one of the listed values, or if two arguments contradict each
            other.

    Source: Ren et al. (arXiv:2406.07537), section 3, and its code.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        directions: Directions = 4,
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed | None = None,
    ) -> None:
        if directions not in (1, 4):
            raise UserError(f"ARMEncoder: directions is 1 or 4; got {directions!r}.")
        for name, count in {"embed_dim": embed_dim, "depth": depth, "d_state": d_state}.items():
            if count < 1:
                raise UserError(f"ARMEncoder: {name} is at least 1; got {count}.")
        check_widths("ARMEncoder", embed_dim=embed_dim, d_state=d_state)
        if depth > MOST_BLOCKS:
            raise UserError(f"ARMEncoder: depth is at most {MOST_BLOCKS}; got {depth}.")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"ARMEncoder: drop_path_rate is in [0, 1); got {drop_path_rate}.")
        # As published: the first block has rate 0, and each later block has the linear rule's rate of the block before.
        rates = [0.0, *cast("list[float]", calculate_drop_path_rates(drop_path_rate, depth))][:depth]
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token="none" if directions == 1 else "middle",
            drop_rate=drop_rate,
            pos_embed=pos_embed or ("sincos" if directions == 1 else "learned"),
            embed_dim=embed_dim,
            blocks=[ARMBlock(embed_dim, d_state, directions, rate) for rate in rates],
            norm=LayerNorm(embed_dim),
        )
        self.directions = directions

    def forward_tokens(self, patches: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Insert the class token, if there is one, run all blocks and the final norm.

        Args:
            patches: Patch tokens of `embed`, (B, K, D). Four directions need all patches in raster order. One direction
                takes any patches and scans them in the given order.
            grid_size: Numbers of rows and columns of patches, with K patches in total. One direction does not need it.

        Returns:
            Features of the whole sequence, (B, K + n, D).

        Raises:
            ValueError: If there are four directions and `grid_size` is None or does not match the number of patches.
        """
        if self.directions == 4:
            patches = _whole_grid(patches, grid_size)
        return super().forward_tokens(patches, grid_size)


def _whole_grid(patches: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
    """Return the patches unchanged, or raise a ValueError if their number is not that of the grid."""
    if grid_size is None or math.prod(grid_size) != patches.shape[1]:
        raise UserError(
            f"ARMEncoder: four directions read the patches of a whole grid; got {patches.shape[1]} patches and "
            f"grid_size {grid_size}. Use directions=1 for a part of the patches."
        )
    return patches


torch.fx.wrap("_whole_grid")

# Arguments of each registered name. All other arguments have the defaults of `ARMEncoder`.
VARIANTS: dict[str, dict[str, int]] = {
    "arm_base_patch16_224": {"embed_dim": 768, "depth": 12},
    "arm_large_patch16_224": {"embed_dim": 1024, "depth": 24},
    "arm_huge_patch16_224": {"embed_dim": 1536, "depth": 24},
    "test_arm": {"embed_dim": 32, "depth": 4},
}
_CFG = image_cfg(paper_ids="arXiv:2406.07537", origin_url="https://github.com/OliverRensu/ARM")
default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, _CFG))


# Names whose `features_only` gives a pyramid, each with the name of the same encoder without a pyramid.
PYRAMIDS = {"arm_base_patch16_pyramid_224": "arm_base_patch16_224"}
default_cfgs |= generate_default_cfgs(dict.fromkeys(PYRAMIDS, _CFG))


@register_model
def arm_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ARMEncoder:
    """ARM-B: 85.0 M parameters, published top-1 83.2 %."""
    return build(ARMEncoder, "arm_base_patch16_224", pretrained, kwargs)


@register_model
def arm_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> ARMEncoder:
    """ARM-L: 297.0 M parameters."""
    return build(ARMEncoder, "arm_large_patch16_224", pretrained, kwargs)


@register_model
def arm_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> ARMEncoder:
    """ARM-H: 662.7 M parameters, published top-1 85.0 %."""
    return build(ARMEncoder, "arm_huge_patch16_224", pretrained, kwargs)


@register_model
def arm_base_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> ARMEncoder:
    """ARM-B whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(ARMEncoder, "arm_base_patch16_pyramid_224", pretrained, kwargs)


@register_model
def test_arm(pretrained: bool = False, **kwargs: Any) -> ARMEncoder:
    """ARM encoder for tests: 4 blocks, 32 channels, 0.11 M parameters without the head."""
    return build(ARMEncoder, "test_arm", pretrained, kwargs)
