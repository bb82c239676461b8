"""Masked autoencoding of images with an encoder that runs on visible patches alone.

Legend: B images, L patches, K kept patches, D encoder width, H x W pixels, h x w grid, p patch side.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.layers.state_space import MOST_BLOCKS, check_widths
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.encoders.timm_families import init_linear
from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.objectives.masked.patches import hideable_patch, random_mask, unit_in_patches
from ssmpretrain.objectives.masked.pretraining import Pretraining, Reconstruction
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)


class MAE(Pretraining):
    """Masked autoencoding: encode the visible patches, predict the pixels of the hidden ones.

    The visible patches stay in raster order, because a scan reads in order. Vim's class token sits in the middle of the
    visible patches. The decoder gets the encoded patches at their places, and a shared mask token at all other places.
    Without `init_from`, encoder and decoder start with the initial values of MAE (ViT) or of masked Vim (Vim).

    A patch is the smallest square that the encoder can leave out: the patch of Vim and ViT, and for VMamba the square
    of pixels that becomes one position of the last stage (32 x 32 with four stages). See `VMamba.forward_visible`.

    Args:
        encoder: Name of the encoder: a Vim, a VMamba, or timm's ViT or DeiT. None takes the encoder of `init_from`, or
            vim_base_patch16_224 without `init_from`.
        encoder_args: Further arguments of the encoder, e.g. `{drop_path_rate: 0.1}`. Fresh position embeddings are a
            fixed sine-cosine table unless `pos_embed` is given here. They fit the images of the data unless `img_size`
            is given here.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. None starts from scratch.
        mask_ratio: Fraction of the patches hidden, in (0, 1).
        mask_unit: Side in pixels of the squares that are hidden as a whole, a multiple of the patch; None is one patch.
        decoder: Kind of decoder block: "vim", with the settings `scan_norm` and `backward_dt_bias_init` of a Vim
            encoder, or "vit" as in the paper.
        decoder_embed_dim: Width of the decoder; a multiple of 4, and of `decoder_num_heads` for "vit".
        decoder_depth: Blocks of the decoder, at least 1.
        decoder_num_heads: Attention heads of a "vit" decoder.
        decoder_class_token: Place of the encoder's class token, if any, in the decoder: "last" as published, or
            "middle" of the patches. Checkpoints of older versions, without this option, use "middle". A continued run
            keeps the place of its checkpoint.
        normalize_targets: Whether to standardise the pixels of each patch before the loss.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss, val/loss: Mean squared error per hidden pixel; in squared target deviations when normalize_targets.
        Validation uses the same masks every time.

    Raises:
        ValueError: If an argument is out of range, if the encoder is unknown or cannot run on visible patches alone, or
            if the file does not fill the encoder.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), sec. 3; sorted visible
        tokens and a decoder of two Vim blocks as in FastVim (Kapse et al., arXiv:2502.00594) and its code; whole units
        of a hierarchical encoder as in Hiera (Ryali et al., arXiv:2306.00989).
    """

    former_settings: ClassVar[dict[str, Any]] = {"decoder_class_token": "middle"}

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        mask_ratio: float = 0.75,
        mask_unit: int | None = None,
        decoder: Literal["vim", "vit"] = "vim",
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        normalize_targets: bool = True,
        optimizer: AdamW = AdamW(),  # noqa: B008  (read only)
        schedule: Schedule = Cosine(),  # noqa: B008
        decoder_class_token: Literal["last", "middle"] = "last",
    ) -> None:
        _check_arguments(mask_ratio, decoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        if decoder_class_token not in ("last", "middle"):
            raise UserError(f"MAE: decoder_class_token is 'last' or 'middle'; got {decoder_class_token!r}.")
        if encoder is None and not init_from:
            encoder = "vim_base_patch16_224"
            rank_zero_only(_log.info)("MAE: no encoder is named; it takes %s", encoder)
        super().__init__(
            encoder,
            encoder_args,
            normalize_targets,
            optimizer,
            schedule,
            init_from=init_from,
            mask_ratio=mask_ratio,
            mask_unit=mask_unit,
            decoder=decoder,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            decoder_class_token=decoder_class_token,
        )
        self.decoder_class_token = decoder_class_token
        self.mask_ratio = mask_ratio
        where, instead = type(self).__name__, "SimMIM, whose encoders see mask tokens"
        self.patch_size = hideable_patch(where, self.encoder, self.encoder_name, instead)
        self.unit = unit_in_patches(where, mask_unit, self.patch_size)
        self.decoder_embed = nn.Linear(self.encoder.num_features, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self._grid, self._pos_embed = (0, 0), torch.empty(0)  # rebuilt when the grid changes
        self.decoder = _build_decoder(self.encoder, decoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * self.patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        if self.init_from is None and not any(self.encoder_args.get(key) for key in OTHER_WEIGHTS):
            family_of(encoder).init_for_masking(encoder)
        if self.init_from is None and self.encoder_args.get("pos_embed") is None:
            family_of(encoder).fix_positions(encoder)
        return encoder

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        trained = {**self.former_settings, **checkpoint.get("hyper_parameters", {})}["decoder_class_token"]
        if trained != self.decoder_class_token:
            rank_zero_only(_log.info)("decoder_class_token %s, as in the checkpoint", trained)
            self.decoder_class_token = self.hparams["decoder_class_token"] = trained

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Hide patches of `images` (B, 3, H, W) and predict all patches. `generator` fixes the choice of patches."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        mask = random_mask(len(images), grid, self.mask_ratio, images.device, generator, self.unit)
        family = family_of(self.encoder)
        seen = family.forward_visible(self.encoder, images, mask.keep)
        class_token, features = family.class_and_patches(self.encoder, seen)  # (B, D) or None, (B, K, D)
        return Reconstruction(self._decode(features, class_token, mask.keep, grid).float(), mask.hidden)

    def _decode(self, features: Tensor, class_token: Tensor | None, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict every patch, (B, L, 3 * p * p), from the encoded visible ones (B, K, D)."""
        B, L = len(keep), grid[0] * grid[1]
        embedded = self.decoder_embed(features)  # (B, K, decoder width)
        index = keep.unsqueeze(-1).expand(-1, -1, embedded.shape[-1])
        tokens = self.mask_token.to(embedded.dtype).expand(B, L, -1).scatter(1, index, embedded)
        tokens = tokens + self._decoder_pos_embed(grid)
        if class_token is None:
            return self.decoder_pred(self.decoder(tokens))  # type: ignore[no-any-return]
        place = L if self.decoder_class_token == "last" else L // 2
        summary = self.decoder_embed(class_token).unsqueeze(1).to(tokens.dtype)
        decoded = self.decoder(torch.cat([tokens[:, :place], summary, tokens[:, place:]], dim=1))
        return self.decoder_pred(torch.cat([decoded[:, :place], decoded[:, place + 1 :]], dim=1))  # type: ignore[no-any-return]

    def _decoder_pos_embed(self, grid: tuple[int, int]) -> Tensor:
        if grid != self._grid:
            self._grid, self._pos_embed = grid, sincos_pos_embed(self.mask_token.shape[-1], grid).to(self.device)
        return self._pos_embed


def _build_decoder(encoder: nn.Module, kind: str, width: int, depth: int, num_heads: int) -> nn.Module:
    if kind == "vim":
        family = family_of(encoder)
        return family.decoder(encoder, depth, width) or VimBlocks(depth, width, **family.decoder_args(encoder))
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    blocks = [ViTBlock(width, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    decoder = nn.Sequential(*blocks, norm(width))
    init_linear(decoder)
    return decoder


def _check_arguments(mask_ratio: float, decoder: str, width: int, depth: int, num_heads: int) -> None:
    if not 0 < mask_ratio < 1:
        raise UserError(f"MAE: mask_ratio is a fraction in (0, 1); got {mask_ratio}. The paper's value is 0.75.")
    if decoder not in ("vim", "vit"):
        raise UserError(f"MAE: decoder is 'vim' or 'vit'; got {decoder!r}.")
    if not 1 <= depth <= MOST_BLOCKS:
        raise UserError(f"MAE: decoder_depth is from 1 to {MOST_BLOCKS}; got {depth}.")
    check_widths("MAE", decoder_embed_dim=width)
    if width < 4 or width % 4 or (decoder == "vit" and width % num_heads):
        raise UserError(
            f"MAE: decoder_embed_dim is a multiple of 4 (and of decoder_num_heads={num_heads} for a vit decoder); "
            f"got {width}."
        )
