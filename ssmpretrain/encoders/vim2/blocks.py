"""Vim2's blocks (norm, Mamba-2 mixer or attention, and an MLP) and the stack of such blocks.

B batch, L tokens, D channels
"""

import math
from typing import cast

import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.fx_tracing import one_node
from ssmpretrain.encoders.layers.plain_modules import is_called_plainly, is_plain
from ssmpretrain.encoders.layers.projection import Mlp, Projection
from ssmpretrain.encoders.layers.rms_norm import RMSNorm, rms_norm_linear, rms_norm_linear_parts
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, add_branch, check_widths
from ssmpretrain.encoders.sequence.block_stack import BlockStack
from ssmpretrain.encoders.vim2.mixer import DIRECTIONS, Directions, Vim2Mixer

ATTENTION_HEAD = 64  # channels of a head of attention


class AttentionMixer(nn.Module):
    """Mix tokens by multi-head self-attention with heads of 64 channels: (B, L, D) to (B, L, D).

    Source: Hatamizadeh & Kautz, "MambaVision" (arXiv:2407.08083), which ends its stages with some such blocks.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = max(dim // ATTENTION_HEAD, 1)
        self.qkv = Projection(dim, 3 * dim)
        self.out_proj = Projection(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))  # type: ignore[no-any-return]


class Vim2Block(nn.Module):
    """Compute x + mixer(norm(x)), then x + mlp(norm2(x)) if there is an MLP, of tokens (B, L, D).

    The residual stream x stays in its dtype, float32 or float64, for every dtype of the branches.
    """

    def __init__(self, mixer: Vim2Mixer | AttentionMixer, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = RMSNorm(dim)
            self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)  # type: ignore[no-any-return]
        return self.add_mlp(add_branch(self.drop_path(self.mixed(x)), x))

    def mixed(self, x: Tensor) -> Tensor:
        """Compute mixer(norm(x)), (B, L, D).

        If no module has a hook or an adapter, only `x` is saved for the backward pass, which computes the norm again.
        """
        mixer = self.mixer
        if not (isinstance(mixer, Vim2Mixer) and is_called_plainly(mixer, Vim2Mixer)):
            return mixer(self.norm(x))  # type: ignore[no-any-return]
        if not (is_plain(self.norm, RMSNorm) and is_plain(mixer.in_proj, Projection)):
            return mixer(self.norm(x))  # type: ignore[no-any-return]
        rows, dt = rms_norm_linear_parts(x, self.norm, mixer.in_proj, mixer.in_proj_sizes)
        return mixer.mix(rows, dt)

    def add_mlp(self, x: Tensor) -> Tensor:
        """Compute x + mlp(norm2(x)); x itself without an MLP."""
        mlp = self.mlp
        if mlp is None:
            return x
        if is_called_plainly(mlp, Mlp) and is_plain(self.norm2, RMSNorm) and is_plain(mlp.fc1, Projection, bias=True):
            return add_branch(self.drop_path(mlp.fc2(F.gelu(rms_norm_linear(x, self.norm2, mlp.fc1)))), x)
        return add_branch(self.drop_path(mlp(self.norm2(x))), x)


class Vim2Blocks(BlockStack):
    """Run a stack of Vim2's blocks and a final norm on tokens, (B, L, D) to (B, L, D).

    It is the body of the encoder, and also the decoder of masked pretraining.

    Args:
        depth: Number of blocks.
        embed_dim: D.
        mlp_ratio: Hidden channels of the MLP per channel; 0 for blocks without an MLP.
        attention_blocks: Number of last blocks that have self-attention in the place of the mixer.
        d_state, d_conv, expand, head_dim, num_groups, bidirectional, divide_output: As in `Vim2Mixer`.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1); it rises linearly from 0 at the first block.
        branch_depth: Number d of blocks for the initial values: the weights of every `out_proj` are divided by
            sqrt(d). None means `depth`.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int,
        *,
        mlp_ratio: float = 0,
        attention_blocks: int = 0,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        bidirectional: Directions = "shared",
        divide_output: bool = True,
        drop_path_rate: float = 0.0,
        branch_depth: int | None = None,
    ) -> None:
        if bidirectional not in DIRECTIONS:
            raise UserError(f"Vim2: bidirectional is one of {', '.join(DIRECTIONS)}; got {bidirectional!r}.")
        sizes = {"depth": depth, "embed_dim": embed_dim, "d_state": d_state, "d_conv": d_conv, "head_dim": head_dim}
        for name, count in {**sizes, "num_groups": num_groups}.items():
            if count < 1:
                raise UserError(f"Vim2: {name} is at least 1; got {count}.")
        if depth > MOST_BLOCKS:
            raise UserError(f"Vim2: depth is at most {MOST_BLOCKS}; got {depth}.")
        if not 0 <= attention_blocks <= depth:
            raise UserError(f"Vim2: attention_blocks is from 0 to the depth, {depth}; got {attention_blocks}.")
        if attention_blocks and embed_dim > ATTENTION_HEAD and embed_dim % ATTENTION_HEAD:
            raise UserError(
                f"Vim2: embed_dim is a multiple of {ATTENTION_HEAD} with attention_blocks; got {embed_dim}."
            )
        if not 0 <= mlp_ratio < math.inf:
            raise UserError(f"Vim2: mlp_ratio is finite and at least 0; got {mlp_ratio}.")
        if not 1 <= expand * embed_dim < math.inf:
            raise UserError(f"Vim2: expand * embed_dim is finite and at least 1; got {expand} * {embed_dim}.")
        check_widths("Vim2", embed_dim=embed_dim, d_state=d_state, d_conv=d_conv, num_groups=num_groups)
        products = {"expand * embed_dim": expand * embed_dim, "mlp_ratio * embed_dim": mlp_ratio * embed_dim}
        check_widths("Vim2", **products)
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"Vim2: drop_path_rate is in [0, 1); got {drop_path_rate}.")

        def mixer(number: int) -> Vim2Mixer | AttentionMixer:
            if number >= depth - attention_blocks:
                return AttentionMixer(embed_dim)
            return Vim2Mixer(embed_dim, d_state, d_conv, expand, head_dim, num_groups, bidirectional, divide_output)

        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth - 1)] + [drop_path_rate]
        blocks = [Vim2Block(mixer(i), embed_dim, mlp_ratio, rate) for i, rate in enumerate(rates)]
        super().__init__(embed_dim, blocks, RMSNorm(embed_dim), branch_depth)

    def _stage(self, stage: int, x: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        return self.layers[stage](x)  # type: ignore[no-any-return]

    def _stage_and_mixer(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        block = cast(Vim2Block, self.layers[stage])
        mixed = block.mixed(x)
        # `add_branch` may overwrite its argument, and the mixer's output is returned too.
        return block.add_mlp(x + block.drop_path(mixed)), mixed
