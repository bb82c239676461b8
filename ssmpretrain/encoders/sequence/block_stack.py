"""Residual blocks one after the other: the body of the encoders that keep an image as one sequence.

B batch, L tokens, D channels
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.fx
from timm.models import checkpoint
from torch import Tensor, nn

from ssmpretrain.encoders.layers.fx_tracing import NotScriptable
from ssmpretrain.encoders.layers.state_space import stream
from ssmpretrain.kernels.transforms import inside_transform

torch.fx.wrap("stream")

# A_log, D and dt_proj.bias of a mixer, and those of its further directions, such as A_b_log and dt_proj_c.bias.
_STATE_SPACE = re.compile(r"\.mixer\.(A(_\w+)?_log|D(_\w+)?|dt_proj(_\w+)?\.bias)$")


class BlockStack(NotScriptable, nn.Module):
    """A stack of residual blocks and a final norm: (B, L, D) to (B, L, D).

    Args:
        embed_dim: D.
        blocks: The blocks, each with a `mixer` that ends in `out_proj` and, unless `_stage` is overridden, called with
            the stream and `grid_size`.
        norm: The final norm.
        branch_depth: The blocks' outputs start as small as those of a stack of this depth; None is that of this stack.
        blocks_per_stage: Blocks that make one step of the residual stream together.
    """

    def __init__(
        self,
        embed_dim: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        branch_depth: int | None = None,
        blocks_per_stage: int = 1,
    ) -> None:
        super().__init__()
        self.blocks_per_stage = blocks_per_stage
        self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.layers = nn.ModuleList(blocks)
        self.norm_f = norm
        for block in blocks:
            # Every residual branch adds variance to the stream; 1/sqrt(depth) keeps their sum at the scale of one
            # (GPT-2, section 2.3).
            weight = cast(Any, block).mixer.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight.div_(math.sqrt(branch_depth or len(blocks)))

    @property
    def num_stages(self) -> int:
        """Return the number of steps of the residual stream."""
        return len(self.layers) // self.blocks_per_stage

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks and the final norm on tokens (B, L, D)."""
        return self.norm_f(self.run(x)[0])  # type: ignore[no-any-return]

    def run(
        self,
        x: Tensor,
        take: Collection[int] = (),
        last: int | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run stages and return the residual stream before the final norm.

        Args:
            x: Tokens, (B, L, D), any floating dtype; the stream is float32 or wider.
            take: Stages after which to take the stream as well.
            last: The last stage to run; None runs all.
            grid_size: Rows and columns of the patches among the tokens, for blocks that ask; None where they are not
                all there.

        Returns:
            The stream after the last stage, (B, L, D), and those of `take`, in the order of the stages.
        """
        num_stages = self.num_stages if last is None else last + 1
        x, taken = stream(x), []
        # Recomputed in the backward pass, which `torch.func` does not support.
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not inside_transform()
        for stage in range(num_stages):
            x = checkpoint(self._stage, stage, x, grid_size) if recompute else self._stage(stage, x, grid_size)
            if stage in take:
                taken.append(x)
        return x, taken

    def _stage(self, stage: int, x: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        return self.layers[stage](x, grid_size)  # type: ignore[no-any-return]

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that must not decay: decays A, skips D, step-size biases."""
        return {name for name, _ in self.named_parameters() if _STATE_SPACE.search(name)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep only the stream between blocks and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable
