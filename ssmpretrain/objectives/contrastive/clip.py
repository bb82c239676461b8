"""Contrastive language-image pretraining.

Legend: B images, E width of the common space, H x W pixels
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.contrastive.head import ContrastiveHead, Loss, gradient_of
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.objectives.masked.patches import hideable_patch, patch_grid, random_mask
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)


class CLIP(Contrastive, Objective):
    """Train an image encoder and a text tower so that an image and its caption have the same direction in one space.

    The image tower consists of the encoder, pooling, and a linear projection. Batches come from a data module of images
    with captions, such as `ssmpretrain.datamodules.ImageTextShards`.

    Args:
        encoder: Name of the encoder, ours or timm's; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder; they override those that `init_from` was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run of MAE, SimMIM or
            ARM, a checkpoint, an exported or a published file. None starts from scratch.
        init_both_towers: Whether to take the text tower, the projection, the temperature and the bias from `init_from`
            too. Then `init_from` must be a run of CLIP.
        lock_image: Whether to freeze the encoder: no gradient, and evaluation mode also in training. The projection of
            its features and the text tower train.
        mask_ratio: Fraction of the patches, in [0, 1), that the encoder does not see in training. They are drawn anew
            for every image. Evaluation uses whole images. Values above 0 work with Vim, VMamba and timm's ViT. For the
            paper's unmasked tuning, continue with a short run with 0, by `init_from` and `init_both_towers`.
        text: Settings of the text tower.
        embed_dim: E, at least 1.
        loss: "clip" is a softmax over the captions of an image and over the images of a caption. "siglip" is a binary
            decision for each pair.
        init_logit_scale: Logarithm of the initial factor of the similarities. Training keeps it in [0, ln 100]. None
            takes ln(1 / 0.07) for "clip" and ln 10 for "siglip".
        init_logit_bias: Initial bias of the "siglip" loss; None takes -10.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs: as `Contrastive`.

    Raises:
        ValueError: If an argument is out of range, if neither `encoder` nor `init_from` is given, if the file does not
            fill the encoder, if the encoder cannot leave patches out, or if both towers are locked.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020),
        figure 3; Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343), algorithm 1;
        `lock_image`: Zhai et al., "LiT" (arXiv:2111.07991); `mask_ratio`: Li et al., "Scaling Language-Image
        Pre-training via Masking" (arXiv:2212.00794).
    """

    sources_of_weights: ClassVar[tuple[str, ...]] = ("init_from", "init_both_towers")

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        init_both_towers: bool = False,
        lock_image: bool = False,
        mask_ratio: float = 0.0,
        text: TextTower = TextTower(),  # noqa: B008  (read only)
        embed_dim: int = 512,
        loss: Loss = "clip",
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
        optimizer: AdamW = AdamW(lr_per_256=3.125e-5, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6),  # noqa: B008
        schedule: Schedule = Cosine(warmup_epochs=1),  # noqa: B008
    ) -> None:
        if not 0 <= mask_ratio < 1:
            raise UserError(f"CLIP: mask_ratio is a fraction in [0, 1); got {mask_ratio}. FLIP's value is 0.5.")
        if init_both_towers:
            text = replace(text, init_from=_only_source(init_from, text))
        settings: dict[str, Any] = {"init_from": init_from, "lock_image": lock_image, "mask_ratio": mask_ratio}
        super().__init__(encoder, encoder_args, optimizer, schedule, **settings)
        self.mask_ratio = mask_ratio
        if mask_ratio:
            self.patch_size = hideable_patch("CLIP", self.encoder, self.encoder_name, "set mask_ratio to 0")
        self.own(ContrastiveHead("CLIP", self.encoder, text, embed_dim, loss, init_logit_scale, init_logit_bias))
        if init_both_towers and init_from is not None:
            self.contrastive.fill_from_run(init_from)

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        return encoder.requires_grad_(False).eval() if self.hparams["lock_image"] else encoder

    def configure_model(self) -> None:
        super().configure_model()
        has_weights = self.init_from or any(self.encoder_args.get(name) for name in ("pretrained", "checkpoint_path"))
        if self.hparams["lock_image"] and not has_weights:
            rank_zero_only(_log.warning)(
                "CLIP: lock_image keeps the encoder as it comes, and it comes with fresh weights. Set model.init_from "
                "to a run or a file of weights."
            )

    def encode_for_training(self, images: Tensor) -> Tensor:
        if not self.mask_ratio:
            return self.encode_image(images)
        grid = self._grid((images.shape[2], images.shape[3]))
        mask = random_mask(len(images), grid, self.mask_ratio, images.device)
        with gradient_of(self.encoder):
            features = family_of(self.encoder).pool_visible(self.encoder, images, mask.keep)
        return self.contrastive.project_image(features)

    def check_image_size(self, size: tuple[int, int]) -> None:
        if self.mask_ratio:
            self._grid(size)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return patch_grid("CLIP", size, self.patch_size)


def _only_source(init_from: str | None, text: TextTower) -> str:
    if init_from is None or text.init_from is not None:
        got = "no init_from" if init_from is None else f"text.init_from {text.init_from} too"
        raise UserError(f"CLIP: init_both_towers takes all of the run in init_from; got {got}. Name one run there.")
    return init_from
