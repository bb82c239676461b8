"""Tokens of an encoder that keeps an image as one sequence: patches, class tokens or registers, and their positions.

B batch, M = H x W patches of an image, K of them in the sequence (all, or only the visible patches), n class tokens,
D channels
"""

import torch
import torch.fx
from timm.layers.weight_init import trunc_normal_
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import check_widths
from ssmpretrain.encoders.sequence.class_token import (
    class_positions,
    insert_class_tokens,
    remove_class_tokens,
    token_in_table,
)
from ssmpretrain.encoders.sequence.patch_embed import PatchEmbed, checked_pixels, grid_of, to_height_width
from ssmpretrain.encoders.sequence.pos_embed import resize_grid, resize_pos_embed, sincos_pos_embed

# These functions read shapes, which torch.fx does not know while it traces, so each of them becomes one node.
for _name in ("checked_pixels", "grid_of", "insert_class_tokens", "remove_class_tokens", "resize_grid"):
    torch.fx.wrap(_name)


class SequenceTokens(nn.Module):
    """Part of `SequenceEncoder` that turns images into tokens.

    Attributes:
        class_token: Place of the class tokens, as in `class_positions`.
        num_registers: Number of registers; 0 for other class tokens.
        num_class_tokens: n.
        pos_embed: Position embedding of the patches and of the class tokens among them, (1, M + n, D).
        pos_embed_cls: Position embedding of registers, (1, n, D). Then `pos_embed` has the M patches alone. An encoder
            without registers does not have it.
    """

    embed_dim: int
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter
    pos_embed_cls: nn.Parameter
    pos_drop: nn.Module

    def _init_tokens(
        self, patch_embed: PatchEmbed, class_token: str, num_registers: int, pos_embed: str, drop_rate: float
    ) -> None:
        """Set the attributes and draw the initial values; see `SequenceEncoder` for the arguments."""
        self._check_registers(class_token, num_registers)
        self.class_token, self.num_registers = class_token, num_registers
        self.num_class_tokens = len(class_positions(class_token, 0, num_registers))
        self.patch_embed = patch_embed
        for name in self._class_token_names():
            tokens = torch.zeros(1, num_registers or 1, self.embed_dim)
            self.register_parameter(name, nn.Parameter(trunc_normal_(tokens, std=0.02)))
        self.init_positions(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)

    def _check_registers(self, class_token: str, num_registers: int) -> None:
        if class_token == "registers":
            check_widths(self._where, num_registers=num_registers)
            if num_registers < 1:
                raise UserError(f"{self._where}: num_registers is at least 1; got {num_registers}. Mamba-Reg uses 12.")
        elif num_registers:
            raise UserError(
                f"{self._where}: num_registers belongs to class_token='registers'; got {num_registers} with "
                f"class_token={class_token!r}. Leave num_registers out, or set it to 0 if a name sets it."
            )

    @property
    def _where(self) -> str:
        return type(self).__name__

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
        rows, _ = self._position_rows()
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

    def _with_class_tokens(self, patches: Tensor) -> Tensor:
        if self.num_class_tokens:
            learned = torch.cat([getattr(self, name) for name in self._class_token_names()], dim=1)
            _, rows = self._position_rows()
            tokens = (learned + rows).to(patches.dtype).expand(patches.shape[0], -1, -1)
            patches = insert_class_tokens(patches, tokens, self.class_token)
        return self.pos_drop(patches)  # type: ignore[no-any-return]

    def _class_token_names(self) -> list[str]:
        if self.class_token == "double":
            return ["cls_token_head", "cls_token_tail"]
        return [] if self.class_token == "none" else ["cls_token"]

    def _position_rows(self) -> tuple[Tensor, Tensor]:
        """Return the position rows of the patches, (1, M, D), and of the class tokens, (1, n, D)."""
        if self.class_token == "registers":
            return self.pos_embed, self.pos_embed_cls
        return remove_class_tokens(self.pos_embed, self.class_token)

    def init_positions(self, kind: str) -> None:
        """Set a new position embedding for the encoder's image size, `pos_embed`, (1, M + n, D).

        Registers have an embedding of their own, `pos_embed_cls`, (1, n, D). Then `pos_embed` has the M patches alone.

        Args:
            kind: "learned" draws random values. "sincos" gives the fixed sine-cosine table, which is not trained; the
                rows of class tokens are zeros.
        """
        fixed, inside = kind == "sincos", token_in_table(self.class_token)
        class_rows = torch.zeros(1, len(class_positions(inside, 0)), self.embed_dim)
        grid = torch.zeros(1, self.patch_embed.num_patches, self.embed_dim)
        if fixed:
            grid = sincos_pos_embed(self.embed_dim, self.patch_embed.grid_size)
        tables = {"pos_embed": insert_class_tokens(grid, class_rows, inside)}
        if self.class_token == "registers":
            tables["pos_embed_cls"] = torch.zeros(1, self.num_registers, self.embed_dim)
        for name, table in tables.items():
            values = table if fixed else trunc_normal_(table, std=0.02)
            setattr(self, name, nn.Parameter(values, requires_grad=not fixed))

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
