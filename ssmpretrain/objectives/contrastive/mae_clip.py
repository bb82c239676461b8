"""Masked autoencoding and contrastive language-image pretraining of one encoder in one run.

Legend: B images, E width of the common space, H x W pixels
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.contrastive.head import ContrastiveHead, Loss
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.objectives.masked.mae import MAE
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule


class MAECLIP(Contrastive, MAE):
    """Train an encoder with two losses: match whole images with their captions, and predict hidden patches.

    Every image passes the encoder twice: as a whole for the contrastive loss, and its visible patches alone for the
    reconstruction. The loss is `clip_weight * contrastive loss + mae_weight * reconstruction loss`. With
    `trainer.accumulate_grad_batches` the contrastive loss is that of the large batch, as in CLIP. The reconstruction
    loss is the mean over the batches, as in MAE.

    Args:
        encoder: As in MAE.
        encoder_args: As in MAE.
        init_from: Source of the encoder's weights, as in CLIP; decoder and text tower start afresh.
        clip_weight: Weight of the contrastive loss, above 0.
        mae_weight: Weight of the reconstruction loss, above 0.
        mask_ratio: Fraction of the patches hidden for the reconstruction, in (0, 1).
        mask_unit, decoder, decoder_embed_dim, decoder_depth, decoder_num_heads, normalize_targets,
            decoder_class_token: As in MAE.
        text, embed_dim, loss, init_logit_scale, init_logit_bias: As in CLIP.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs: the other metrics of `Contrastive`, and
        train/clip_loss, val/clip_loss: Contrastive loss without its weight.
        train/mae_loss, val/mae_loss: Reconstruction loss without its weight, as in MAE.
        train/loss, val/loss: Weighted sum. In training it contains the reconstruction of the last accumulated batch.

    Raises:
        ValueError: If an argument is out of range, or the encoder cannot run on visible patches alone.

    Source: Weers et al., "Masked Autoencoding Does Not Help Natural Language Supervision at Scale" (arXiv:2301.07836),
        MAE-CLIP. The paper found a gain with 11 million pairs and none with 1.4 billion. Two things differ here: the
        decoder is that of our MAE, and the weights of the losses are free.
    """

    reads_map_alone = False

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        clip_weight: float = 1.0,
        mae_weight: float = 1.0,
        mask_ratio: float = 0.75,
        mask_unit: int | None = None,
        decoder: Literal["vim", "vit"] = "vim",
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        normalize_targets: bool = True,
        text: TextTower = TextTower(),  # noqa: B008  (read only)
        embed_dim: int = 512,
        loss: Loss = "clip",
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
        optimizer: AdamW = AdamW(lr_per_256=3.125e-5, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6),  # noqa: B008
        schedule: Schedule = Cosine(warmup_epochs=1),  # noqa: B008
        decoder_class_token: Literal["last", "middle"] = "last",
    ) -> None:
        for name, weight in {"clip_weight": clip_weight, "mae_weight": mae_weight}.items():
            if not 0 < weight < math.inf:
                raise UserError(f"MAECLIP: {name} is a number above 0; got {weight}. For one loss use CLIP or MAE.")
        super().__init__(
            encoder,
            encoder_args,
            init_from,
            mask_ratio,
            mask_unit,
            decoder,
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            normalize_targets,
            optimizer,
            schedule,
            decoder_class_token,
        )
        self.save_hyperparameters({"clip_weight": clip_weight, "mae_weight": mae_weight})
        self.clip_weight, self.mae_weight = clip_weight, mae_weight
        self.own(ContrastiveHead("MAECLIP", self.encoder, text, embed_dim, loss, init_logit_scale, init_logit_bias))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        reconstruction_loss = self.loss(images, self.reconstruct(images))
        contrastive_loss = self.contrast_step(batch)
        if contrastive_loss is None:
            return self.mae_weight * reconstruction_loss
        self._log_losses("train", contrastive_loss, reconstruction_loss)
        large_batch = self.trainer.accumulate_grad_batches * contrastive_loss  # Lightning divides by it
        return self.clip_weight * large_batch + self.mae_weight * reconstruction_loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._reconstructed = torch.zeros(2, device=self.device)  # sum of the loss over images, number of images

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        images = batch["image"]
        masks = torch.Generator(images.device).manual_seed(batch_idx)
        loss = self.loss(images, self.reconstruct(images, masks))
        self._reconstructed += torch.stack([loss * len(images), loss.new_tensor(len(images))])
        return super().validation_step(batch, batch_idx)

    def log_validation(self, loss: Tensor) -> None:
        reconstruction_loss, images = self.trainer.strategy.reduce(self._reconstructed, reduce_op="sum")
        self._log_losses("val", loss, reconstruction_loss / images)

    def _log_losses(self, when: str, contrastive: Tensor, reconstruction: Tensor) -> None:
        losses = {"clip_loss": contrastive, "mae_loss": reconstruction}
        losses["loss"] = self.clip_weight * contrastive + self.mae_weight * reconstruction
        for name, loss in losses.items():
            self.log(f"{when}/{name}", loss.detach(), prog_bar=name == "loss", sync_dist=True)
