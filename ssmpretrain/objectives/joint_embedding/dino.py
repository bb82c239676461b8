"""DINO with iBOT: the student predicts what its own moving average sees in other views, and at masked patches.

Legend: B images, T global views, S views, H x W pixels, h x w grid of the last map, L = h w, D encoder width,
M masked patches, K prototypes
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmpretrain.encoders.features.encoded import Encoded, encode
from ssmpretrain.encoders.masking.stem import Stem, masked_stem, stem_of
from ssmpretrain.objectives.joint_embedding.gram import Gram, gram_loss
from ssmpretrain.objectives.joint_embedding.head import DINOHead, LastLayer
from ssmpretrain.objectives.joint_embedding.losses import (
    centred_softmax,
    dino_loss,
    entropy,
    ibot_loss,
    koleo,
    mean_over_ranks,
    sinkhorn_knopp,
)
from ssmpretrain.objectives.joint_embedding.masks import Drawn, Masks
from ssmpretrain.objectives.joint_embedding.teacher import Taught, Teacher
from ssmpretrain.objectives.masked.patches import on_pixels
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)
Assign = Literal["centre", "sinkhorn"]


class DINO(Taught):
    """Self-distillation without labels, with the patch loss of iBOT as an option. (docstring to come)"""

    mask_token: nn.Parameter | None
    centre: Tensor | None
    patch_centre: Tensor | None

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        num_prototypes: int = 65536,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        last_layer: LastLayer = "unit",
        freeze_last_layer_epochs: float = 1,
        student_temperature: float = 0.1,
        teacher_temperature: Ramp = Ramp(0.04, 0.07, "linear", 30),  # noqa: B008  (read only)
        momentum: Ramp = Ramp(0.996, 1.0),  # noqa: B008
        assign: Assign = "centre",
        centre_momentum: float = 0.9,
        ibot: float = 0.0,
        ibot_from_epoch: float = 0,
        masks: Masks = Masks(),  # noqa: B008
        patch_prototypes: int | None = None,
        patch_teacher_temperature: Ramp | None = None,
        koleo: float = 0.0,
        gram: Gram | None = None,
        clip_per_tensor: float | None = 3.0,
        layer_decay: float = 1.0,
        optimizer: AdamW = AdamW(lr_per_256=5e-4, weight_decay=0.04, betas=(0.9, 0.999)),  # noqa: B008
        schedule: Schedule = Cosine(warmup_epochs=10, final_fraction=1e-3),  # noqa: B008
    ) -> None:
        super().__init__(
            encoder,
            encoder_args,
            optimizer,
            schedule,
            init_from=init_from,
            num_prototypes=num_prototypes,
            head_hidden_dim=head_hidden_dim,
            head_bottleneck_dim=head_bottleneck_dim,
            last_layer=last_layer,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            momentum=momentum,
            assign=assign,
            centre_momentum=centre_momentum,
            ibot=ibot,
            ibot_from_epoch=ibot_from_epoch,
            masks=masks,
            patch_prototypes=patch_prototypes,
            patch_teacher_temperature=patch_teacher_temperature,
            koleo=koleo,
            gram=gram,
            clip_per_tensor=clip_per_tensor,
            layer_decay=layer_decay,
        )
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.patch_teacher_temperature = patch_teacher_temperature or teacher_temperature
        self.momentum, self.assign, self.centre_momentum = momentum, assign, centre_momentum
        self.ibot, self.ibot_from_epoch, self.masks, self.koleo, self.gram = ibot, ibot_from_epoch, masks, koleo, gram
        self.freeze_last_layer_epochs, self.layer_decay = freeze_last_layer_epochs, layer_decay
        sizes = (head_hidden_dim, head_bottleneck_dim, last_layer)
        width = self.encoder.num_features
        patch = DINOHead(width, patch_prototypes, *sizes) if ibot and patch_prototypes is not None else None
        self.head = DINOHead(width, num_prototypes, *sizes, patch)
        self.stem = _stem(self.encoder, self.encoder_name) if ibot else None
        token = torch.empty(1, 1, 1, self.stem.width) if self.stem else None
        self.register_parameter(
            "mask_token", None if token is None else nn.Parameter(nn.init.trunc_normal_(token, std=0.02))
        )
        centred = assign == "centre"
        self.register_buffer("centre", torch.zeros(num_prototypes) if centred else None)
        num_patch = patch_prototypes or num_prototypes
        self.register_buffer("patch_centre", torch.zeros(num_patch) if centred and ibot else None)
        self._means: dict[str, list[Tensor]] = {"centre": [], "patch_centre": []}  # of the batches of a step
        self.build_teacher()

    def build_teacher(self) -> None:
        super().build_teacher()
        if self.gram is not None:
            self.gram_teacher = Teacher(self.encoder, nn.Identity())

    # The method

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        views = self.views_of(batch)
        images = views.of_globals.flatten(0, 1)  # (B * T, 3, H, W)
        taught = self.teacher(images)
        masks = self._draw_masks(len(images), taught.map)
        vectors, patches = self._student(views, masks)
        logits = self.head(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        targets = self._targets(taught.vector).unflatten(0, (-1, views.num_global))
        loss = terms = dino_loss(logits, targets, self.student_temperature)
        self._log("dino_loss", terms)
        self._log_gauges(terms.detach(), targets)
        if self.ibot:
            term = self._patch_loss(patches, taught.map, masks)
            self._log("ibot_loss", term)
            loss = loss + self.ibot * term
        if self.koleo:
            term = sum(koleo(vectors[:, view]) for view in range(views.num_global))
            self._log("koleo_loss", term)
            loss = loss + self.koleo * term
        if self._anchored():
            term = gram_loss(patches, _tokens(self.gram_teacher(images).map))
            self._log("gram_loss", term)
            loss = loss + self.gram.weight * term
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _draw_masks(self, N: int, of: Tensor) -> Drawn:
        grid = (of.shape[2], of.shape[3])
        if not self.ibot or self.trainer.global_step < self.ibot_from_epoch * self._length[1]:
            nothing = Drawn(torch.zeros(N, *grid, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
            return nothing.to(of.device)
        return self.masks.draw(N, grid).to(of.device)

    def _student(self, views: Any, masks: Drawn) -> tuple[Tensor, Tensor]:
        """Encode all views, the global ones with masks.

        Returns:
            Global features of all views, (B, S, D), and features of the patches of the global views, (B * T, L, D).
        """
        first, *others = views.sizes
        encoded = self._encode_masked(first.flatten(0, 1), self._of_all(first, masks.hidden, views.num_global))
        vectors = encoded.vector.unflatten(0, first.shape[:2])
        maps = encoded.map.unflatten(0, first.shape[:2])[:, : views.num_global].flatten(0, 1)
        return torch.cat([vectors, self.encode_views(others)], dim=1) if others else vectors, _tokens(maps)

    def _of_all(self, first: Tensor, hidden: Tensor, num_global: int) -> Tensor:
        """Return the masks (B * V, h, w) of all views of the first size: local views of this size have no mask."""
        mask = hidden.new_zeros(*first.shape[:2], *hidden.shape[1:])
        mask[:, :num_global] = hidden.unflatten(0, (-1, num_global))
        return mask.flatten(0, 1)

    def _encode_masked(self, images: Tensor, hidden: Tensor) -> Encoded:
        """Encode images (N, 3, H, W) whose hidden patches (N, h, w) are replaced by the mask token."""
        if self.stem is None:
            return encode(self.encoder, images)
        grid = (hidden.shape[1], hidden.shape[2])
        seen = torch.where(on_pixels(hidden.flatten(1), grid, self.stem.map_stride), 0, images)
        with masked_stem(self.encoder, hidden, self.mask_token):
            return encode(self.encoder, seen)

    @torch.no_grad()
    def _targets(self, features: Tensor) -> Tensor:
        """Return the teacher's probabilities (N, K) of its features (N, D) of global views."""
        logits, temperature = self.teacher.head(features), self.value_of(self.teacher_temperature)
        if self.assign == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        self._means["centre"].append(logits.mean(dim=0))
        return centred_softmax(logits, self.centre, temperature)

    def _patch_loss(self, student: Tensor, taught: Tensor, masks: Drawn) -> Tensor:
        """Compute the loss of masked patches from features of the student (N, L, D) and the teacher's map."""
        logits = self.head.of_patches(student.flatten(0, 1)[masks.index])  # (M, K)
        with torch.no_grad():
            targets = self._patch_targets(_tokens(taught).flatten(0, 1), masks.index)
        return ibot_loss(logits, targets, masks.weight, self.student_temperature)

    def _patch_targets(self, features: Tensor, index: Tensor) -> Tensor:
        head, temperature = self.teacher.head.of_patches, self.value_of(self.patch_teacher_temperature)
        if self.assign == "sinkhorn":
            return sinkhorn_knopp(head(features[index]), temperature)
        projected = head.project(features)
        # The last layer is linear: the mean of the logits of all patches is the logit of their mean.
        self._means["patch_centre"].append(head.last_layer(projected.mean(dim=0)))
        return centred_softmax(head.last_layer(projected[index]), self.patch_centre, temperature)

    def _anchored(self) -> bool:
        return self.gram is not None and self.trainer.global_step >= self.gram.first_step

    # What is logged

    def _log(self, name: str, value: Tensor | float) -> None:
        self.log(
            f"train/{name}", torch.full((), value, device=self.device) if isinstance(value, float) else value.detach()
        )

    @torch.no_grad()
    def _log_gauges(self, dino: Tensor, targets: Tensor) -> None:
        certain = entropy(targets)
        self._log("teacher_entropy", certain)
        self._log("kl", dino - certain)
        self._log("momentum", self.value_of(self.momentum))
        self._log("teacher_temperature", self.value_of(self.teacher_temperature))

    # Hooks of Lightning

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, except those in the encoder."""
        return {"mask_token"}

    def build_optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        return self.optimizer_settings.build(self, global_batch, self.layer_decay)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.gram is not None and self.gram.snapshot_due(self.trainer.global_step):
            self.gram_teacher.update(0.0, self.teacher.encoder, self.gram_teacher.head)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step < self.freeze_last_layer_epochs * self._length[1]:
            for layer in self.head.last_layers:
                for parameter in layer.parameters():
                    parameter.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for name, means in self._means.items():
            if means:
                self._move(getattr(self, name), mean_over_ranks(torch.stack(means).mean(dim=0)))
                means.clear()

    @torch.no_grad()
    def _move(self, centre: Tensor, mean: Tensor) -> None:
        """Move a centre towards the mean of the step; a mean that is not finite leaves it."""
        centre.copy_(torch.where(mean.isfinite().all(), centre.lerp(mean, 1 - self.centre_momentum), centre))


def _tokens(features: Tensor) -> Tensor:
    """Return a map (N, D, h, w) as patches (N, L, D) in raster order."""
    return features.flatten(2).transpose(1, 2)


def _stem(encoder: nn.Module, name: str) -> Stem:
    return stem_of(encoder)
