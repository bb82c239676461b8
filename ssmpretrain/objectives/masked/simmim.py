"""Masked image modelling with mask tokens in the encoder, for any encoder that gives a map of features.

Legend: B images, L positions of the last map, D encoder width, H x W pixels, h x w grid, p pixels along a position.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import last_map
from ssmpretrain.encoders.masking.stem import blank, masked_stem, require_stem
from ssmpretrain.objectives.masked.patches import random_mask, unit_in_patches
from ssmpretrain.objectives.masked.pretraining import Pretraining, Reconstruction
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)


class SimMIM(Pretraining):
    """Masked image modelling: a mask token replaces hidden patches, and one linear layer predicts their pixels.

    The paper replaces the output of the patch embedding at hidden positions by the mask token. If the embedding is a
    stack of overlapping convolutions (VMamba, MambaOut), the visible positions beside a hidden one would carry some of
    its pixels. Therefore hidden pixels are first set to 0, the mean colour of the data, and then the output of the stem
    at hidden positions is replaced by the token. For patches that do not overlap, as in the paper, setting pixels to 0
    changes nothing.

    The prediction reads the encoder's last map. One position of the map, p x p pixels, is predicted as a whole, and is
    the smallest square that can be hidden: 32 x 32 with the four stages of VMamba, MambaOut, ConvNeXt and Swin.

    Args:
        encoder: Name of the encoder: a Vim, a VMamba, or timm's MambaOut, ConvNeXt, Swin, Swin V2, ViT or DeiT. None
            takes the encoder of `init_from`, or vmamba_tiny_s1l8 without `init_from`.
        encoder_args: Further arguments of the encoder, e.g. `{drop_path_rate: 0.1}`. A fixed image size fits the images
            of the data unless `img_size` is given here.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. Mask token and prediction head start fresh. None starts from scratch.
        mask_ratio: Fraction of the mask units to hide, in (0, 1).
        mask_unit: Side in pixels of the squares that are hidden as a whole, a multiple of p; None is p.
        normalize_targets: Whether to standardise the p x p pixels of each position before the loss.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss, val/loss: Mean absolute error per hidden pixel; in target deviations when normalize_targets.
        Validation uses the same masks every time.

    Raises:
        ValueError: If an argument is out of range, if the encoder or its patch embedding is unknown, or if the file
            does not fill the encoder.

    Source: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (arXiv:2111.09886), sec. 3.
    """

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        mask_ratio: float = 0.6,
        mask_unit: int | None = 32,
        normalize_targets: bool = False,
        optimizer: AdamW = AdamW(),  # noqa: B008  (read only)
        schedule: Schedule = Cosine(),  # noqa: B008
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise UserError(f"SimMIM: mask_ratio is a fraction in (0, 1); got {mask_ratio}. The paper's value is 0.6.")
        if encoder is None and not init_from:
            encoder = "vmamba_tiny_s1l8"
            rank_zero_only(_log.info)("SimMIM: no encoder is named; it takes %s", encoder)
        super().__init__(
            encoder,
            encoder_args,
            normalize_targets,
            optimizer,
            schedule,
            init_from=init_from,
            mask_ratio=mask_ratio,
            mask_unit=mask_unit,
        )
        stem = require_stem("SimMIM", self.encoder, self.encoder_name)
        self.mask_ratio = mask_ratio
        self.patch_size = stem.map_stride
        self.unit = unit_in_patches("SimMIM", mask_unit, self.patch_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, 1, stem.width))
        self.prediction_head = nn.Linear(self.encoder.num_features, 3 * self.patch_size**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Hide squares of `images` (B, 3, H, W) and predict all positions. `generator` fixes the choice of squares."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        hidden = random_mask(len(images), grid, self.mask_ratio, images.device, generator, self.unit).hidden
        places = hidden.view(-1, *grid)
        with masked_stem(self.encoder, places, self.mask_token):
            features = last_map(self.encoder, blank(images, places))  # (B, D, h, w)
        # One linear layer per position: the paper's 1 x 1 convolution and pixel shuffle, in the layout of `patchify`.
        predicted = self.prediction_head(features.flatten(2).transpose(1, 2))
        return Reconstruction(predicted.float(), hidden)

    def pixel_error(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return (predicted - targets).abs()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, except those in the encoder."""
        return {"mask_token"}
