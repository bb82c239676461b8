"""Vim's block (RMSNorm, bidirectional Mamba mixer, residual sum) and the stack of such blocks.

Attributes have the names of the official state dicts, so published weights load without renaming.

    B batch, L tokens, D channels, E = expand * D inner channels, N state, W width of the conv
"""

import math
from typing import Literal, cast, get_args

from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.fx_tracing import one_node, refuse_tracing
from ssmpretrain.encoders.layers.plain_modules import is_called_plainly, is_plain
from ssmpretrain.encoders.layers.rms_norm import RMSNorm, rms_norm_linear
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, add_branch, check_widths
from ssmpretrain.encoders.sequence.block_stack import BlockStack
from ssmpretrain.encoders.vim.mixer import BACKWARD_BIAS, BackwardBias, VimMixer

Bidirectional = Literal["ssm_conv", "none", "sequence", "layer", "ssm"]
BIDIRECTIONAL: tuple[str, ...] = get_args(Bidirectional)


class VimBlock(nn.Module):
    """Compute x + mixer(norm(x)) of tokens (B, L, D).

    The residual stream x stays in its dtype, float32 or float64, for every dtype of the mixer.
    """

    def __init__(self, mixer: VimMixer, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)  # type: ignore[no-any-return]
        return add_branch(self.drop_path(self.branch(x)), x)

    def branch(self, x: Tensor) -> Tensor:
        """Compute mixer(norm(x)) of tokens, (B, L, D) to (B, L, D).

        If no module has a hook or an adapter, only `x` is saved for the backward pass, which computes the norm again.
        """
        plain = is_plain(self.norm, RMSNorm) and is_plain(self.mixer.in_proj, nn.Linear)
        if not (plain and is_called_plainly(self.mixer, VimMixer)):
            return self.mixer(self.norm(x))  # type: ignore[no-any-return]
        return self.mixer.mix(rms_norm_linear(x, self.norm, self.mixer.in_proj))


class VimBlocks(BlockStack):
    """Run a stack of Vim blocks and a final norm on tokens, (B, L, D) to (B, L, D).

    It is the body of the encoder, and also the decoder of masked pretraining.

    Args:
        depth: Number of blocks; even for `bidirectional="layer"`.
        embed_dim: D.
        d_state: N, states per inner channel.
        expand: E / D, the width inside the mixer.
        d_conv: W, taps of the depthwise convolution.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1); it rises linearly from 0 at the first block.
        bidirectional: How a token gets information from both sides. "ssm_conv" (published): each block has two scans,
            each with its own convolution and projections. "ssm": each block has two scans with different decays and
            everything else in common. "layer": blocks work in pairs, the second one on the reversed sequence; the two
            outputs and the two residual streams are summed. "sequence": one forward scan; in training, the whole
            sequence is reversed with probability `flip_probability` (one draw per batch). "none": one forward scan.
        divide_output: Halve the sum of the two directions of "ssm_conv". The published weights were trained so.
        flip_probability: Probability of a reversed sequence for "sequence", in [0, 1].
        backward_dt_bias_init: Initial step sizes of the backward direction. "mamba" draws them like those of the
            forward direction, as the authors intended. "zero" sets all of them to softplus(0) = 0.69, as the published
            code does by mistake; the published weights were trained so.
        scan_norm: Apply a LayerNorm to the output of the scan before the gate, as published for masked pretraining.
        branch_depth: Number d of blocks for the initial values: the weights of every `out_proj` are divided by
            sqrt(d). None means `depth`.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), sections 3.2 to 3.4 and 4.4; for `scan_norm` Kapse et al.,
        "FastVim" (arXiv:2502.00594), and its code.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int,
        *,
        d_state: int = 16,
        expand: float = 2,
        d_conv: int = 4,
        drop_path_rate: float = 0.0,
        bidirectional: Bidirectional = "ssm_conv",
        divide_output: bool = True,
        flip_probability: float = 0.5,
        backward_dt_bias_init: BackwardBias = "mamba",
        scan_norm: bool = False,
        branch_depth: int | None = None,
    ) -> None:
        _check_choice("bidirectional", bidirectional, BIDIRECTIONAL)
        _check_choice("backward_dt_bias_init", backward_dt_bias_init, BACKWARD_BIAS)
        for name, count in {"depth": depth, "embed_dim": embed_dim, "d_state": d_state, "d_conv": d_conv}.items():
            if count < 1:
                raise UserError(f"Vim: {name} is at least 1; got {count}.")
        if depth > MOST_BLOCKS:
            raise UserError(f"Vim: depth is at most {MOST_BLOCKS}; got {depth}.")
        if not 1 <= expand * embed_dim < math.inf:
            raise UserError(f"Vim: expand * embed_dim is finite and at least 1; got {expand} * {embed_dim}.")
        check_widths("Vim", embed_dim=embed_dim, d_state=d_state, d_conv=d_conv)
        check_widths("Vim", **{"expand * embed_dim": expand * embed_dim})
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"Vim: drop_path_rate is in [0, 1); got {drop_path_rate}.")
        if not 0 <= flip_probability <= 1:
            raise UserError(f"Vim: flip_probability is in [0, 1]; got {flip_probability}.")
        if bidirectional == "layer" and depth % 2:
            raise UserError(f"Vim: bidirectional='layer' pairs the blocks, so depth is even; got {depth}.")

        # The published code drops the output of a block inside the next block, so its list of rates is shifted by one
        # block. Its last output is dropped at the full rate before the final norm. The result is this linear rule.
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth - 1)] + [drop_path_rate]
        blocks = [
            VimBlock(
                VimMixer(
                    embed_dim, d_state, d_conv, expand, bidirectional, divide_output, backward_dt_bias_init, scan_norm
                ),
                embed_dim,
                rate,
            )
            for rate in rates
        ]
        together = 2 if bidirectional == "layer" else 1
        super().__init__(
            embed_dim,
            blocks,
            RMSNorm(embed_dim),
            branch_depth,
            blocks_per_stage=together,
            flip_probability=flip_probability if bidirectional == "sequence" else None,
        )
        self.bidirectional = bidirectional

    def _stage(self, stage: int, x: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        if self.bidirectional != "layer":
            return self.layers[stage](x)  # type: ignore[no-any-return]
        refuse_tracing("Vim", x, "the pairs of blocks of bidirectional='layer'")
        ahead, back = (cast(VimBlock, self.layers[2 * stage + which]) for which in (0, 1))
        reversed_x = x.flip(1)
        mixed = ahead.branch(x) + back.branch(reversed_x).flip(1)
        return 2 * x + back.drop_path(mixed)  # type: ignore[no-any-return]

    def _stage_and_mixer(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        block = cast(VimBlock, self.layers[stage])
        mixed = block.branch(x)
        # `add_branch` may overwrite its argument, and the mixer's output is returned too.
        return x + block.drop_path(mixed), mixed


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"Vim: {name} is one of {', '.join(choices)}; got {value!r}.")
