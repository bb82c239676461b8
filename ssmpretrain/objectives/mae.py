"""Masked autoencoding of images with a scan encoder.

Legend: B images, L patches, K kept patches, D encoder width, H x W pixels, h x w grid, p patch side.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.pos_embed import sincos_pos_embed
from ssmpretrain.encoders.vim_blocks import VimBlocks
from ssmpretrain.training.global_batch import GlobalBatch
from ssmpretrain.training.optimizers import AdamW
from ssmpretrain.training.schedules import Cosine

_log = logging.getLogger(__name__)


class Reconstruction(NamedTuple):
    """What one masked forward pass gives.

    Attributes:
        predicted: Predicted pixels of every patch, (B, L, 3 * p * p), float32; in units of the target.
        keep: Raster indices of the visible patches, (B, K), int64, ascending.
        hidden: True where a patch was hidden, (B, L), bool.
    """

    predicted: Tensor
    keep: Tensor
    hidden: Tensor


class MAE(LightningModule):
    """Masked autoencoding: encode the visible patches, predict the pixels of the hidden ones.

    The visible patches stay in raster order, because a scan reads in order, and the class token sits in the middle of
    what the encoder sees. The decoder gets the encoded patches at their places and a shared mask token elsewhere.

    Args:
        encoder: Name of the encoder (`ssmpretrain.list_encoders()`); it must be able to run on visible patches alone.
        encoder_args: Further arguments of the encoder, e.g. `{img_size: 224, pos_embed: sincos}`.
        mask_ratio: Fraction of the patches hidden, in (0, 1).
        decoder: Kind of decoder block: "vim", or "vit" as in the paper.
        decoder_embed_dim: Width of the decoder; a multiple of 4, and of `decoder_num_heads` for "vit".
        decoder_depth: Blocks of the decoder, at least 1.
        decoder_num_heads: Attention heads of a "vit" decoder.
        normalize_targets: Standardise the pixels of each patch before the loss.
        optimizer: AdamW settings; the learning rate follows the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss, val/loss: Mean squared error per hidden pixel; in squared target deviations when normalize_targets.
        Validation uses the same masks every time.

    Raises:
        ValueError: If an argument is out of range, or the encoder is unknown or cannot run on visible patches alone.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), sec. 3; sorted visible
        tokens and a decoder of two Vim blocks as in FastVim (Kapse et al., arXiv:2502.00594).
    """

    encoder: Any  # an encoder of ours: a timm model with embed, forward_tokens and split_tokens

    def __init__(
        self,
        encoder: str = "vim_base_patch16_224",
        encoder_args: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        decoder: Literal["vim", "vit"] = "vim",
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        normalize_targets: bool = True,
        optimizer: AdamW = AdamW(),  # noqa: B008  (read only)
        schedule: Cosine = Cosine(),  # noqa: B008
    ) -> None:
        super().__init__()
        _check_arguments(mask_ratio, decoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        encoder_args = dict(encoder_args or {})
        self.save_hyperparameters(
            {
                "encoder": encoder,
                "encoder_args": encoder_args,
                "mask_ratio": mask_ratio,
                "decoder": decoder,
                "decoder_embed_dim": decoder_embed_dim,
                "decoder_depth": decoder_depth,
                "decoder_num_heads": decoder_num_heads,
                "normalize_targets": normalize_targets,
                "optimizer": asdict(optimizer),
                "schedule": asdict(schedule),
            }
        )
        self.encoder_name, self.encoder_args = encoder, encoder_args
        self.mask_ratio = mask_ratio
        self.normalize_targets = normalize_targets
        self.optimizer_settings, self.schedule = optimizer, schedule

        self.encoder = create_encoder(encoder, num_classes=0, **encoder_args)
        self.patch_size = _patch_size(self.encoder, encoder)
        self.decoder_embed = nn.Linear(self.encoder.num_features, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self._grid, self._pos_embed = (0, 0), torch.empty(0)  # fixed, made for the grid at hand
        self.decoder = _build_decoder(decoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * self.patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    # The method

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        loss = self.loss(images, self.reconstruct(images))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["image"]
        masks = torch.Generator(images.device).manual_seed(batch_idx)
        loss = self.loss(images, self.reconstruct(images, masks))
        self.log("val/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Hide patches of `images` (B, 3, H, W) and predict all of them; `generator` fixes which are hidden."""
        tokens = self.encoder.embed(images)  # (B, L, D)
        B, L, D = tokens.shape
        if L < 2:
            raise ValueError(
                f"MAE: an image has at least two patches, one to see and one to predict; got {tuple(images.shape[2:])} "
                f"pixels with patches of {self.patch_size}. Raise the image size or lower the patch size."
            )
        keep = random_keep(B, L, self.mask_ratio, tokens.device, generator)  # (B, K)
        visible = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, D))
        class_token, features = self.encoder.split_tokens(self.encoder.forward_tokens(visible))

        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        predicted = self._decode(features, class_token, keep, grid)
        hidden = torch.ones(B, L, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
        return Reconstruction(predicted.float(), keep, hidden)

    def _decode(self, features: Tensor, class_token: Tensor | None, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict every patch, (B, L, 3 * p * p), from the encoded visible ones (B, K, D)."""
        B, L = len(keep), grid[0] * grid[1]
        embedded = self.decoder_embed(features)  # (B, K, decoder width)
        index = keep.unsqueeze(-1).expand(-1, -1, embedded.shape[-1])
        tokens = self.mask_token.to(embedded.dtype).expand(B, L, -1).scatter(1, index, embedded)
        tokens = tokens + self._decoder_pos_embed(grid)
        if class_token is None:
            return self.decoder_pred(self.decoder(tokens))  # type: ignore[no-any-return]
        middle = L // 2
        summary = self.decoder_embed(class_token).unsqueeze(1).to(tokens.dtype)
        decoded = self.decoder(torch.cat([tokens[:, :middle], summary, tokens[:, middle:]], dim=1))
        return self.decoder_pred(torch.cat([decoded[:, :middle], decoded[:, middle + 1 :]], dim=1))  # type: ignore[no-any-return]

    def _decoder_pos_embed(self, grid: tuple[int, int]) -> Tensor:
        if grid != self._grid:
            self._grid, self._pos_embed = grid, sincos_pos_embed(self.mask_token.shape[-1], grid).to(self.device)
        return self._pos_embed

    def loss(self, images: Tensor, reconstruction: Reconstruction) -> Tensor:
        """Mean squared error over the pixels of the hidden patches, a scalar in float32."""
        targets = patchify(images.float(), self.patch_size)
        if self.normalize_targets:
            mean, std = _patch_statistics(targets)
            targets = (targets - mean) / std
        error = (reconstruction.predicted - targets).square().mean(dim=-1)  # (B, L)
        return (error * reconstruction.hidden).sum() / reconstruction.hidden.sum()

    def predicted_images(self, images: Tensor, reconstruction: Reconstruction) -> Tensor:
        """Predicted patches put together as images (B, 3, H, W), in the units of `images`.

        With normalised targets a patch is given back the mean and deviation of the true one, as in the paper's figures.
        """
        predicted = reconstruction.predicted
        if self.normalize_targets:
            mean, std = _patch_statistics(patchify(images.float(), self.patch_size))
            predicted = predicted * std + mean
        return unpatchify(predicted, self.patch_size, (images.shape[2], images.shape[3]))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of whole images (B, 3, H, W): the mean over the patch tokens, as evaluated online."""
        _, patches = self.encoder.split_tokens(self.encoder.forward_features(images))
        return patches.mean(dim=1)  # type: ignore[no-any-return]

    # What Lightning asks for

    def configure_optimizers(self) -> OptimizerLRScheduler:
        batch = GlobalBatch.of(self.trainer)
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError("MAE: the schedule needs an end; set trainer.max_epochs or trainer.max_steps.")
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / batch.accumulation)
        settings = self.optimizer_settings
        rank_zero_only(_log.info)(
            "peak lr %.3g = %.3g x global batch / 256; global batch %s; %d steps, %d an epoch",
            settings.peak_lr(batch.size), settings.lr_per_256, batch, total_steps, steps_per_epoch,
        )  # fmt: skip
        optimizer = settings.build(self, batch.size)
        scheduler = self.schedule.build(optimizer, int(total_steps), steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["encoder"] = {"name": self.encoder_name, "args": self.encoder_args}


def random_keep(B: int, L: int, mask_ratio: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw the patches that stay visible, uniformly for each image: (B, K) raster indices in ascending order.

    K = L - round(L * mask_ratio), but at least one patch is kept and one hidden.
    """
    num_hidden = min(max(round(L * mask_ratio), 1), L - 1)
    noise = torch.rand(B, L, device=device, generator=generator)
    return noise.argsort(dim=1)[:, num_hidden:].sort(dim=1).values


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, L, p * p * 3), raster order, each patch row by row, channels last."""
    B, C, H, W = images.shape
    p = patch_size
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Put patches (B, L, p * p * 3) back together as images (B, 3, H, W); the inverse of `patchify`."""
    p, (H, W) = patch_size, size
    return patches.reshape(len(patches), H // p, W // p, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, H, W)


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()  # 1e-6: the paper's code, keeps a flat patch finite


def _build_decoder(kind: str, width: int, depth: int, num_heads: int) -> nn.Module:
    if kind == "vim":
        return VimBlocks(depth=depth, embed_dim=width)
    blocks = [ViTBlock(width, num_heads, mlp_ratio=4, qkv_bias=True) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width))


def _patch_size(encoder: nn.Module, name: str) -> int:
    if not all(hasattr(encoder, method) for method in ("embed", "forward_tokens", "split_tokens")):
        raise ValueError(
            f"MAE: the encoder runs on the visible patches alone; {name!r} cannot. "
            "Choose one of ssmpretrain.list_encoders('vim*')."
        )
    patch_embed: Any = encoder.patch_embed
    patch_size, stride = int(patch_embed.patch_size), int(patch_embed.stride)
    if patch_size != stride:
        raise ValueError(
            f"MAE: patches must not overlap; {name!r} has patch_size {patch_size} and stride {stride}. "
            f"Set encoder_args.stride to {patch_size}."
        )
    return patch_size


def _check_arguments(mask_ratio: float, decoder: str, width: int, depth: int, num_heads: int) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(f"MAE: mask_ratio is a fraction in (0, 1); got {mask_ratio}. The paper's value is 0.75.")
    if decoder not in ("vim", "vit"):
        raise ValueError(f"MAE: decoder is 'vim' or 'vit'; got {decoder!r}.")
    if depth < 1:
        raise ValueError(f"MAE: decoder_depth is at least 1; got {depth}.")
    if width < 4 or width % 4 or (decoder == "vit" and width % num_heads):
        raise ValueError(
            f"MAE: decoder_embed_dim is a multiple of 4 (and of decoder_num_heads={num_heads} for a vit decoder); "
            f"got {width}."
        )
