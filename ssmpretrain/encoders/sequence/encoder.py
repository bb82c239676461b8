"""Base class of encoders that keep an image as one sequence of patches and class tokens. Names follow timm.

B batch, M = H x W patches of an image, K of them in the sequence (all, or only the visible patches), n class tokens,
L = K + n tokens, D channels
"""

from typing import Any, Literal, get_args

import torch.fx
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import take_indices
from ssmpretrain.encoders.sequence.block_stack import BlockStack
from ssmpretrain.encoders.sequence.class_token import ClassToken, remove_class_tokens
from ssmpretrain.encoders.sequence.head import GlobalPool, SequenceHead
from ssmpretrain.encoders.sequence.patch_embed import PatchEmbed

torch.fx.wrap("remove_class_tokens")  # it reads shapes, which torch.fx does not know while it traces

PosEmbed = Literal["learned", "sincos"]


class SequenceEncoder(SequenceHead, BlockStack):
    """Encode an image as one sequence of patches and class tokens, by a stack of blocks; classify it by a head.

    Args:
        img_size: Size of the images in pixels, one number or (height, width). The position embedding has one row for
            each patch of such an image; it is resized for images of other sizes.
        patch_size: Side of a patch in pixels.
        stride: Distance between neighbouring patches in pixels; None means `patch_size`.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Tokens that the head reads. "token": the class token; for "double" and "registers" the mean of all.
            "avg": the mean of the patch tokens. "max": every patch token; the largest logit of each class is kept.
            "concat": each register, projected to D / `register_reduction` channels; their concatenation is normalised.
            "": every token of the sequence. None means "token" if there is a class token, else "avg".
        class_token: Place of the class token: "middle", "head", "double" (one at each end), "none", or "registers"
            (`num_registers` tokens between the patches).
        num_registers: n, number of registers; 0 for other class tokens.
        register_reduction: Factor by which `global_pool="concat"` reduces the channels of each register, a divisor of
            D; 1 concatenates the registers as they are. Other kinds of pooling do not read it.
        drop_rate: Dropout on the embedded tokens, in [0, 1).
        pos_embed: "learned", or "sincos" for the fixed sine-cosine table of masked autoencoders.
        blocks_per_group: Neighbouring blocks that share one learning rate under layer decay (`group_matcher`).
        **stack: Arguments of the base class that follows in the inheritance order: `BlockStack` or a subclass of it.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words, or if two arguments contradict each
            other.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int | None,
        in_chans: int,
        num_classes: int,
        global_pool: GlobalPool | None,
        class_token: ClassToken,
        drop_rate: float,
        pos_embed: PosEmbed,
        num_registers: int = 0,
        register_reduction: int = 1,
        blocks_per_group: int = 1,
        **stack: Any,
    ) -> None:
        super().__init__(**stack)
        if pos_embed not in get_args(PosEmbed):
            raise UserError(f"{self._where}: pos_embed is one of {', '.join(get_args(PosEmbed))}; got {pos_embed!r}.")
        if not 0 <= drop_rate < 1:
            raise UserError(f"{self._where}: drop_rate is in [0, 1); got {drop_rate}.")
        self.in_chans = in_chans
        self.num_features = self.embed_dim
        self.blocks_per_group = blocks_per_group
        patches = PatchEmbed(img_size, patch_size, patch_size if stride is None else stride, in_chans, self.embed_dim)
        self._init_tokens(patches, class_token, num_registers, pos_embed, drop_rate)
        self._init_head(global_pool, register_reduction, num_classes)

        reduction = self.patch_embed.stride
        self.feature_info = [
            {
                "module": f"layers.{(stage + 1) * self.blocks_per_stage - 1}",
                "num_chs": self.embed_dim,
                "reduction": reduction,
            }
            for stage in range(self.num_stages)
        ]

    # Features and logits

    def forward_tokens(self, patches: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Insert the class tokens among the patches, then run all blocks and the final norm.

        Args:
            patches: All patch tokens of `embed`, or some of them, (B, K, D), in raster order. A class token in the
                middle is placed before patch K // 2.
            grid_size: Rows and columns of the patches if all are given, for blocks that read columns; else None.

        Returns:
            Features of the whole sequence, (B, K + n, D). `split_tokens` separates class tokens and patches.
        """
        tokens = self._with_class_tokens(patches)
        stream, _ = self.run(tokens, grid_size=grid_size)
        return self.norm_f(stream)  # type: ignore[no-any-return]

    def split_tokens(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split the features of a sequence, (B, K + n, D), into class features and patch features.

        Returns:
            The mean of the class tokens, (B, D), or None if the encoder has none; and the patches, (B, K, D).
        """
        patches, tokens = remove_class_tokens(features, self.class_token, self.num_registers)
        return (tokens.mean(dim=1) if self.num_class_tokens else None), patches

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of every token after the final norm, (B, M + n, D), for images (B, C, height, width)."""
        patches, grid_size = self._embed(images)
        return self.forward_tokens(patches, grid_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, height, width).

        An encoder without a head (num_classes=0) returns the pooled features (B, D).
        """
        features = self.forward_features(images)
        return self.forward_head(features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        read: str = "stream",
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Return the residual stream after some blocks, as maps for dense tasks.

        The residual stream is the sum that the next block reads. Vim's published detection code takes this sum too.
        Its segmentation code takes the output of the block's mixer without the residual.

        Args:
            x: Images (B, C, height, width).
            indices: Blocks to take. A list gives their indices; negative indices count from the end. A number n takes
                the last n blocks, None all blocks. With Vim's `bidirectional="layer"`, indices count pairs of blocks.
            return_prefix_tokens: Return each map together with its class tokens, (B, n, D). The name is timm's; only a
                class token at the "head" is a prefix of the sequence.
            norm: Apply the final norm to each map.
            stop_early: Skip the blocks after the last block taken. The final features are then those of this block,
                after the final norm.
            output_fmt: "NCHW" gives maps (B, D, H, W), "NLC" patch tokens (B, M, D).
            intermediates_only: Return the list without the final features.
            read: Place in a block: "stream", or "mixer", see `Taps`.

        Returns:
            The final features (B, M + n, D) and the list of maps, or only the list.

        Raises:
            ValueError: If `output_fmt` is not one of the two words or an index is out of range.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"{self._where}: output_fmt is NCHW or NLC; got {output_fmt!r}.")
        take, last = take_indices(self._where, "blocks", self.num_stages, indices)
        tokens, grid_size = self.embed_all(x)
        stream, streams = self.run(tokens, take, last if stop_early else None, grid_size, read)
        taken: list[Any] = []
        for one in streams:
            features = self.norm_f(one) if norm else one
            patches, class_tokens = remove_class_tokens(features, self.class_token, self.num_registers)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid_size)
            taken.append((patches, class_tokens) if return_prefix_tokens else patches)
        return taken if intermediates_only else (self.norm_f(stream), taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last block of `indices`, in place.

        Args:
            indices: Blocks to keep features of, as for `forward_intermediates`.
            prune_norm: Replace the final norm by the identity.
            prune_head: Remove the head.

        Returns:
            The indices, counted from the first block.
        """
        take, last = take_indices(self._where, "blocks", self.num_stages, indices)
        self.layers = self.layers[: (last + 1) * self.blocks_per_stage]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    # Methods that timm's trainers call

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: positions, class tokens, and some in the blocks."""
        own = {"pos_embed", "pos_embed_cls"} if self.class_token == "registers" else {"pos_embed"}
        return {*own, *self._class_token_names(), *super().no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for layer-wise learning rates: one group of the stem, then the blocks.

        The last `blocks_per_group` blocks form the last group, and so on towards the first block. If some first blocks
        do not fill a group, they belong to the stem. The final norm belongs to the head. `coarse` has no effect,
        because the encoder has no stages.

        Source: For single blocks, the rule of MAE (facebookresearch/mae, util/lr_decay.py); for pairs, the rule of
            masked Vim (insitro/FastVim, mae/lr_decay.py).
        """
        step, depth = self.blocks_per_group, len(self.layers)
        rest = depth % step
        # One numbered pattern per group rather than a captured number, so that two blocks can share a group.
        groups = [(_of_blocks(range(first, first + step)), (first,)) for first in range(rest, depth, step)]
        stem = r"^cls_token|^pos_embed|^patch_embed"
        return {"stem": f"{stem}|{_of_blocks(range(rest))}" if rest else stem, "blocks": groups}


def _of_blocks(numbers: range) -> str:
    """Return a pattern that matches the parameter names of some blocks, given by their numbers."""
    return r"^layers\.(?:" + "|".join(map(str, numbers)) + r")\."
