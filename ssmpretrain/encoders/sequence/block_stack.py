"""Stack of residual blocks: the body of encoders that keep an image as one sequence.

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

from ssmpretrain.encoders.layers.fx_tracing import NotScriptable, refuse_tracing
from ssmpretrain.encoders.layers.state_space import stream
from ssmpretrain.kernels.transforms import inside_transform

torch.fx.wrap("stream")

# Names of A_log, D and the bias of the step size in a mixer, also of its other directions: A_b_log and dt_proj_c.bias
# of Mamba's mixer, A_log_b and dt_b_bias of Mamba-2's.
_STATE_SPACE = re.compile(r"\.mixer\.(A(_\w+)?_log(_b)?|D(_\w+)?|dt_proj(_\w+)?\.bias|dt(_b)?_bias)$")


class BlockStack(NotScriptable, nn.Module):
    """Run a stack of residual blocks and a final norm on tokens: (B, L, D) to (B, L, D).

    Args:
        embed_dim: D.
        blocks: The blocks. Each has a `mixer` whose last layer is called `out_proj`. Each is called with the residual
            stream and `grid_size`, unless a subclass overrides `_stage`.
        norm: The final norm.
        branch_depth: Number d of blocks for the initial values: the weights of every `out_proj` are divided by
            sqrt(d). None means the number of `blocks`.
        blocks_per_stage: Number of blocks that together make one step of the residual stream.
        flip_probability: In training, reverse the whole sequence with this probability, in [0, 1], by one draw per
            batch; None never draws.
    """

    def __init__(
        self,
        embed_dim: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        branch_depth: int | None = None,
        blocks_per_stage: int = 1,
        flip_probability: float | None = None,
    ) -> None:
        super().__init__()
        self.flip_probability = flip_probability
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
        """Return the number of stages: steps of the residual stream, each of `blocks_per_stage` blocks."""
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
        read: str = "stream",
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the stages on tokens and return the residual stream before the final norm.

        Args:
            x: Tokens, (B, L, D), any floating-point dtype. The stream is float64 if x is, else float32.
            take: Indices of stages; the features that `read` names are returned of each of them.
            last: Index of the last stage to run; None runs all stages.
            grid_size: Numbers of rows and columns of patches, for blocks that need them; None if the tokens are only a
                part of the patches.
            read: Features of the stages in `take`. "stream": the stream after the stage. "mixer": the output of the
                stage's mixer, before drop path and before it is added to the stream; not every subclass has it.

        Returns:
            The stream after the last stage, (B, L, D), and a list of the features of the stages in `take`, the same
            shape each.
        """
        num_stages = self.num_stages if last is None else last + 1
        backwards = self.training and self.flip_probability is not None and self._draw_direction(x)
        x, taken = stream(x.flip(1) if backwards else x), []
        # torch.func cannot recompute the blocks in the backward pass, so under it all activations are kept.
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not inside_transform()
        for stage in range(num_stages):
            if read == "mixer" and stage in take:
                run = self._stage_and_mixer
                x, mixed = checkpoint(run, stage, x) if recompute else run(stage, x)
                taken.append(mixed)
                continue
            x = checkpoint(self._stage, stage, x, grid_size) if recompute else self._stage(stage, x, grid_size)
            if stage in take:
                taken.append(x)
        return (x.flip(1), [one.flip(1) for one in taken]) if backwards else (x, taken)

    def _draw_direction(self, x: Tensor) -> bool:
        """Draw whether the blocks read this batch from the last token to the first."""
        assert self.flip_probability is not None
        refuse_tracing(
            type(self).__name__, x, "bidirectional='sequence' in training, whose direction is drawn for every batch"
        )
        return torch.rand(()).item() < self.flip_probability

    def _stage(self, stage: int, x: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        return self.layers[stage](x, grid_size)  # type: ignore[no-any-return]

    def _stage_and_mixer(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__}: no output of a mixer to read")

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: decays A, skips D, biases of the step size."""
        return {name for name, _ in self.named_parameters() if _STATE_SPACE.search(name)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off.

        If it is on, the forward pass keeps only the residual stream between stages, and the backward pass computes all
        other activations again. This saves memory and takes more time.
        """
        self.grad_checkpointing = enable
