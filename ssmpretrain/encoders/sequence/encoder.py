"""Base class of encoders that keep an image as one sequence of patches and class tokens. Names follow timm.

B batch, M = H x W patches of an image, K of them in the sequence (all, or only the visible patches), n class tokens,
L = K + n tokens, D channels
"""

from typing import Any, Literal, get_args

import torch
import torch.fx
from timm.layers.weight_init import trunc_normal_
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import take_indices
from ssmpretrain.encoders.sequence.block_stack import BlockStack
from ssmpretrain.encoders.sequence.class_token import (
    ClassToken,
    class_positions,
    insert_class_tokens,
    pool_tokens,
    remove_class_tokens,
)
from ssmpretrain.encoders.sequence.patch_embed import PatchEmbed, checked_pixels, grid_of, to_height_width
from ssmpretrain.encoders.sequence.pos_embed import (
    resize_grid,
    resize_pos_embed,
    sincos_pos_embed,
)

# These functions read shapes, which torch.fx does not know while it traces, so each of them becomes one node.
for _name in ("checked_pixels", "grid_of", "insert_class_tokens", "pool_tokens", "remove_class_tokens", "resize_grid"):
    torch.fx.wrap(_name)

GlobalPool = Literal["token", "avg", "max", ""]
GLOBAL_POOLS: tuple[str, ...] = get_args(GlobalPool)
PosEmbed = Literal["learned", "sincos"]


class SequenceEncoder(BlockStack):
    """Encode an image as one sequence of patches and class tokens, by a stack of blocks; classify it by a head.

    Args:
        img_size: Size of the images in pixels, one number or (height, width). The position embedding has one row for
            each patch of such an image; it is resized for images of other sizes.
        patch_size: Side of a patch in pixels.
        stride: Distance between neighbouring patches in pixels; None means `patch_size`.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Tokens that the head reads. "token": the class token; for "double" the mean of both. "avg": the
            mean of the patch tokens. "max": every patch token; the largest logit of each class is kept. "": every
            token of the sequence. None means "token" if there is a class token, else "avg".
        class_token: Place of the class token: "middle", "head", "double" (one at each end) or "none".
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
        blocks_per_group: int = 1,
        **stack: Any,
    ) -> None:
        super().__init__(**stack)
        if pos_embed not in get_args(PosEmbed):
            raise UserError(f"{self._where}: pos_embed is one of {', '.join(get_args(PosEmbed))}; got {pos_embed!r}.")
        if not 0 <= drop_rate < 1:
            raise UserError(f"{self._where}: drop_rate is in [0, 1); got {drop_rate}.")
        self.num_class_tokens = len(class_positions(class_token, 0))
        self.class_token = class_token
        self.global_pool = self._checked_pool(global_pool)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim
        self.blocks_per_group = blocks_per_group

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_size if stride is None else stride, in_chans, self.embed_dim
        )
        for name in self._class_token_names():
            self.register_parameter(name, nn.Parameter(trunc_normal_(torch.zeros(1, 1, self.embed_dim), std=0.02)))
        self.pos_embed = self.initial_pos_embed(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.head: nn.Module
        self.reset_classifier(num_classes)

        reduction = self.patch_embed.stride
        self.feature_info = [
            {
                "module": f"layers.{(stage + 1) * self.blocks_per_stage - 1}",
                "num_chs": self.embed_dim,
                "reduction": reduction,
            }
            for stage in range(self.num_stages)
        ]

    @property
    def _where(self) -> str:
        return type(self).__name__

    # Tokens

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as patch tokens with positions, in raster order, without class tokens.

        Args:
            images: Normalised images, (B, in_chans, height, width), floating-point. The patches must fill the height
                and the width exactly.

        Returns:
            Patch tokens, (B, M, D).

        Raises:
            ValueError: If the images have another shape or are not floating-point.
        """
        return self._embed(images)[0]

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the patch tokens (B, M, D), and the numbers of rows and columns of patches."""
        images = checked_pixels(images, self._where, self.patch_embed.in_chans)
        grid_size = grid_of((images.shape[2], images.shape[3]), self.patch_embed.patch_size, self.patch_embed.stride)
        patches = self.patch_embed(images)
        rows, _ = remove_class_tokens(self.pos_embed, self.class_token)
        return patches + resize_grid(rows, self.patch_embed.grid_size, grid_size), grid_size

    def embed_all(self, images: Tensor, class_token: bool = True) -> tuple[Tensor, tuple[int, int]]:
        """Embed images as the sequence that the first block reads.

        Args:
            images: As in `embed`.
            class_token: Whether to insert the class tokens, if the encoder has any.

        Returns:
            Patches, and class tokens in their places, (B, M + n, D); and the numbers of rows and columns of patches.
        """
        patches, grid_size = self._embed(images)
        return self._with_class_tokens(patches) if class_token else self.pos_drop(patches), grid_size

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
        patches, tokens = remove_class_tokens(features, self.class_token)
        return (tokens.mean(dim=1) if self.num_class_tokens else None), patches

    def _with_class_tokens(self, patches: Tensor) -> Tensor:
        if self.num_class_tokens:
            learned = torch.cat([getattr(self, name) for name in self._class_token_names()], dim=1)
            _, rows = remove_class_tokens(self.pos_embed, self.class_token)
            tokens = (learned + rows).to(patches.dtype).expand(patches.shape[0], -1, -1)
            patches = insert_class_tokens(patches, tokens, self.class_token)
        return self.pos_drop(patches)  # type: ignore[no-any-return]

    def _class_token_names(self) -> list[str]:
        if self.class_token == "double":
            return ["cls_token_head", "cls_token_tail"]
        return [] if self.class_token == "none" else ["cls_token"]

    def initial_pos_embed(self, kind: str) -> nn.Parameter:
        """Return a new position embedding for the encoder's image size, (1, M + n, D).

        Args:
            kind: "learned" draws random values; "sincos" gives the fixed sine-cosine table, which is not trained.
        """
        if kind == "sincos":
            grid = sincos_pos_embed(self.embed_dim, self.patch_embed.grid_size)
            class_rows = torch.zeros(1, self.num_class_tokens, self.embed_dim)
            return nn.Parameter(insert_class_tokens(grid, class_rows, self.class_token), requires_grad=False)
        table = torch.zeros(1, self.patch_embed.num_patches + self.num_class_tokens, self.embed_dim)
        return nn.Parameter(trunc_normal_(table, std=0.02))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embedding, in place, for images of another size: one number of pixels or (height, width).

        The encoder then adds the embedding to images of this size without resizing it in every forward pass.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.grid_size = self.patch_embed.dynamic_feat_size(to_height_width(img_size))
        self.patch_embed.img_size = to_height_width(img_size)
        resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)  # the input size that an export writes

    # Features and logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of every token after the final norm, (B, M + n, D), for images (B, C, height, width)."""
        patches, grid_size = self._embed(images)
        return self.forward_tokens(patches, grid_size)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features (B, L, D) and, unless `pre_logits`, apply the head.

        Returns:
            Logits (B, num_classes), or pooled features (B, D) for `pre_logits`. With `global_pool=""`, one row for
            each token, (B, L, ...). With `global_pool="max"`, the maximum over all patches of each logit, or of each
            feature, as published.
        """
        pooled = pool_tokens(features, self.class_token, self.global_pool)
        logits = pooled if pre_logits else self.head(pooled)
        return logits.amax(dim=1) if self.global_pool == "max" else logits

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
            patches, class_tokens = remove_class_tokens(self.norm_f(one) if norm else one, self.class_token)
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

    def get_classifier(self) -> nn.Module:
        """Return the head, or an `nn.Identity` if the encoder has no head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a new head with random weights.

        Args:
            num_classes: Outputs of the new head; 0 for no head.
            global_pool: Tokens that the head reads, see the class; None keeps the present choice.
        """
        if num_classes < 0:
            raise UserError(f"{self._where}: num_classes is at least 0; got {num_classes}.")
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            weight = self.patch_embed.proj.weight
            self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _checked_pool(self, global_pool: str | None) -> str:
        if global_pool is None:
            return "token" if self.num_class_tokens else "avg"
        if global_pool not in GLOBAL_POOLS:
            raise UserError(f"{self._where}: global_pool is one of token, avg, max or empty; got {global_pool!r}.")
        if global_pool == "token" and not self.num_class_tokens:
            raise UserError(
                f"{self._where}: global_pool='token' reads the class token, and class_token is 'none'. "
                "Use 'avg' or 'max'."
            )
        return global_pool

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: positions, class tokens, and some in the blocks."""
        return {"pos_embed", *self._class_token_names(), *super().no_weight_decay()}

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
