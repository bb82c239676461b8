"""DINO with iBOT: the student predicts what its own moving average sees in other views, and at masked patches.

Legend: B images, T global views, N = B T, S views, H x W pixels, h x w grid of the last map, L = h w, D encoder width,
M masked patches, K prototypes
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.encoded import Encoded, encode, encode_masked
from ssmpretrain.encoders.features.pooled import pooled_width
from ssmpretrain.encoders.masking.stem import require_stem
from ssmpretrain.objectives.joint_embedding.gauges import costly_gauges, divergence_gauges, teacher_limits
from ssmpretrain.objectives.joint_embedding.gram import Gram, gram_loss
from ssmpretrain.objectives.joint_embedding.head import DINOHead, LastLayer
from ssmpretrain.objectives.joint_embedding.joint_embedding import Views
from ssmpretrain.objectives.joint_embedding.losses import (
    centred_softmax,
    dino_loss,
    ibot_loss,
    koleo_loss,
    mean_over_ranks,
    sinkhorn_knopp,
)
from ssmpretrain.objectives.joint_embedding.masks import Drawn, Masks
from ssmpretrain.objectives.joint_embedding.teacher import Taught, Teacher
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine, Schedule
from ssmpretrain.training.settings import plain
from ssmpretrain.training.stopping.collapse import CollapseLimit, gauges_are_due

_log = logging.getLogger(__name__)
Assign = Literal["centre", "sinkhorn"]


class DINO(Taught):
    """Learn without labels from a teacher that is the moving average of the student.

    The student sees all views of an image, the teacher the global ones. Both map the global feature of each view, see
    `encode`, to a distribution over K prototypes, and the student predicts the teacher's distribution of each other
    view: `dino_loss`. Two things keep the teacher from giving all images the same distribution: a low temperature,
    and either a centre (the moving average of the teacher's logits, subtracted from them) or Sinkhorn-Knopp.

    With `ibot`, mask tokens replace patches of the student's global views, see `Masks` and `encode_masked`, and the
    student predicts the teacher's distributions of the masked patches: `ibot_loss`. The masked views are views of the
    DINO loss too; the teacher's views and the local ones have no mask. The tokens stay in the sequence, so a scan
    passes over the masked places, and class tokens and registers keep their places. A patch is one position of the
    last map: 16 x 16 pixels for Vim and ViT, 32 x 32 for VMamba, Swin, ConvNeXt and MambaOut.

    Statistics are those of all ranks, so the loss does not depend on their number: the centres, and the sums of
    Sinkhorn-Knopp. With `trainer.accumulate_grad_batches` the centres move once per optimizer step, by the mean over
    its batches, as one large batch would move them; Sinkhorn-Knopp balances each batch by itself. Targets, losses and
    logits are float32 in every precision.

    How published runs are stated: DINO ViT-S has the defaults, with 2 global and 8 local views in `data.views`. iBOT
    has `ibot` 1, `num_prototypes` 8192, its own rule of masks (`counts: drawn`, `min_block: 16`), and for Swin
    `ibot_from_epoch` 50. DINOv3 has `assign` sinkhorn, `last_layer` plain, `ibot` 1, `patch_prototypes` 65536, `koleo`
    0.1, `momentum` from 0.992 and `layer_decay` 0.9. What cannot be stated: a lower learning rate of the patch
    embedding, and gradients clipped by the norm of each part of the model (DINOv3); a learning rate of 0 in place of no
    gradient for the last layer (DINOv2, DINOv3); batch normalisation in the head (an option of DINO and iBOT); targets
    of Gram anchoring from larger images (DINOv3); and the second class token of Dino-Mamba, which is not read.

    Args:
        encoder: Name of the encoder, any whose `encode` gives features; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, e.g. `{drop_path_rate: 0.1}`; the teacher has no drop path.
        init_from: Run, checkpoint or file with weights of the encoder, for student and teacher; None for fresh weights.
        num_prototypes: K, at least 2. Take 1024 to 4096 for fewer than 100,000 images.
        head_hidden_dim, head_bottleneck_dim: Widths of the head, see `DINOHead`.
        last_layer: Kind of the head's last layer, see `Prototypes`: "unit" is DINO's `norm_last_layer: true`, "scaled"
            its false, "plain" DINOv3's.
        freeze_last_layer_epochs: Epochs at the start in which the last layer gets no gradient, at least 0.
        student_temperature: Temperature of the student's distributions, above 0.
        teacher_temperature: Temperature of the teacher's, above 0; above 0.07 training is unstable.
        momentum: Momentum of the teacher, in [0, 1].
        assign: "centre" or "sinkhorn", see `centred_softmax` and `sinkhorn_knopp`.
        centre_momentum: Momentum of the centres, in [0, 1).
        ibot: Weight of the loss of masked patches, at least 0; 0 is DINO.
        ibot_from_epoch: Epoch from which views are masked, at least 0.
        masks: Settings of the masks.
        patch_prototypes: Prototypes of a separate head of the patches; None if patches share the head, as in iBOT.
        patch_teacher_temperature: Temperature of the teacher's distributions of patches; None for that of
            `teacher_temperature`. As in iBOT, it begins to move at `ibot_from_epoch`.
        koleo: Weight of KoLeo, see `koleo_loss`, on each global view of the student, at least 0.
        gram: Settings of Gram anchoring; None for none.
        clip_per_tensor: See `JointEmbedding`. Set it to null to use `trainer.gradient_clip_val`.
        layer_decay: Factor on the learning rate from one layer of the encoder to the one below it, in (0, 1].
        optimizer: Settings of AdamW; the learning rate scales with the global batch. Mask token, class and position
            tokens and the state-space parameters of encoders have no weight decay; DINO's own rule would decay Vim's
            `A_log`.
        schedule: Warm-up and decay of the learning rate. DINO ends at 1e-6: with a peak of 1e-3, a fraction of 1e-3.

    Attributes:
        head, teacher: The student's head and the teacher.
        mask_token: The mask token, (1, 1, 1, C), drawn with deviation 0.02; None without `ibot`. (Published code starts
            with zeros, which the first norm of an encoder without positions would amplify.)
        centre, patch_centre: Moving averages, (K,), of the logits of global features and of all patches, masked or not,
            of the teacher's views; None with Sinkhorn-Knopp, and without `ibot`.
        gram_teacher: Snapshot of the teacher, with `gram`.

    Logs:
        train/loss: The sum of all losses with their weights.
        train/dino_loss, train/ibot_loss, train/koleo_loss, train/gram_loss: The losses without their weights.
        train/teacher_entropy: Mean entropy of the teacher's distributions in nats, between 0 and ln K.
        train/kl: Mean divergence of the student from the teacher in nats: dino_loss minus entropy. 0 means collapse.
        train/prototype_entropy: Entropy of the mean of the teacher's distributions, in the steps that are logged. Near
            0, all images have the same prototype.
        train/effective_rank: Effective rank of the teacher's features of the first global view of this rank's images,
            between 1 and the smaller of B and D, in the same steps.
        train/momentum, train/teacher_temperature: Their present values.

    Raises:
        UserError: If an argument is out of range, or the encoder has no known stem and `ibot` is above 0.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv:2104.14294); Zhou et al.,
        "iBOT: Image BERT Pre-Training with Online Tokenizer" (arXiv:2111.07832); Oquab et al., "DINOv2"
        (arXiv:2304.07193); Simeoni et al., "DINOv3" (arXiv:2508.10104).
    """

    optimizer_settings: AdamW
    gram_teacher: Teacher
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
        optimizer: AdamW = AdamW(5e-4, weight_decay=0.04, final_weight_decay=0.4, betas=(0.9, 0.999)),  # noqa: B008
        schedule: Schedule = Cosine(warmup_epochs=10, final_fraction=1e-3),  # noqa: B008
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(settings)
        super().__init__(**settings)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.patch_teacher_temperature, self.momentum = patch_teacher_temperature, momentum
        self.assign, self.centre_momentum = assign, centre_momentum
        self.ibot, self.ibot_from_epoch, self.masks, self.koleo, self.gram = ibot, ibot_from_epoch, masks, koleo, gram
        self.freeze_last_layer_epochs, self.layer_decay = freeze_last_layer_epochs, layer_decay
        width, sizes = pooled_width(self.encoder, self.pooled), (head_hidden_dim, head_bottleneck_dim, last_layer)
        patch = DINOHead(width, patch_prototypes, *sizes) if ibot and patch_prototypes is not None else None
        self.head = DINOHead(width, num_prototypes, *sizes, patch)
        stem = require_stem("DINO", self.encoder, self.encoder_name) if ibot else None
        self.mask_token = None if stem is None else nn.Parameter(torch.empty(1, 1, 1, stem.width))
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        centred = assign == "centre"
        self.register_buffer("centre", torch.zeros(num_prototypes) if centred else None)
        num_patch = num_prototypes if patch_prototypes is None else patch_prototypes
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
        images = views.of_globals.flatten(0, 1)  # (N, 3, H, W)
        taught = self.teacher(images)
        masks = self._draw_masks(taught)
        vectors, patches = self._student(views, masks)

        logits = self.head(vectors.flatten(0, 1)).view(*vectors.shape[:2], -1)  # (B, S, K)
        targets = self._targets(taught.vector).view(len(vectors), views.num_global, -1)  # (B, T, K)
        losses = {"dino": dino_loss(logits, targets, self.student_temperature)}
        if self.ibot:
            losses["ibot"] = self._patch_loss(patches, _tokens(taught.map), masks)
        if self.koleo:
            losses["koleo"] = torch.stack([koleo_loss(vectors[:, t]) for t in range(views.num_global)]).sum()
        if self.gram is not None and self.trainer.global_step >= self.gram.first_step:
            losses["gram"] = gram_loss(patches, _tokens(self.gram_teacher(images).map))

        weights = {"dino": 1.0, "ibot": self.ibot, "koleo": self.koleo, "gram": self.gram.weight if self.gram else 0.0}
        loss = torch.stack([weights[name] * term for name, term in losses.items()]).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}_loss": term.detach() for name, term in losses.items()})
        self._log_gauges(losses["dino"], targets, taught.vector[:: views.num_global])
        return loss

    def _draw_masks(self, taught: Encoded) -> Drawn:
        """Draw the masks of the global views; all places are visible without iBOT, and before its first epoch."""
        N, grid = len(taught.map), (taught.map.shape[2], taught.map.shape[3])
        draws = bool(self.ibot) and self.epochs_done() >= self.ibot_from_epoch
        return (self.masks.draw(N, grid) if draws else Drawn.none(N, grid)).to(taught.map.device)

    def _student(self, views: Views, masks: Drawn) -> tuple[Tensor, Tensor]:
        """Encode all views, the global ones with masks.

        Returns:
            Global features of all views, (B, S, D), and features of the patches of the global views, (N, L, D).
        """
        first, *others = views.sizes
        encoded = self._encode(first.flatten(0, 1), _of_all(masks.hidden, first.shape[:2], views.num_global))
        vectors, maps = (part.view(*first.shape[:2], *part.shape[1:]) for part in encoded)
        if others:
            vectors = torch.cat([vectors, self.encode_views(others)], dim=1)
        return vectors, _tokens(maps[:, : views.num_global].flatten(0, 1))

    def _encode(self, images: Tensor, hidden: Tensor) -> Encoded:
        if self.mask_token is None:
            return encode(self.encoder, images)
        return encode_masked(self.encoder, images, hidden, self.mask_token)

    @torch.no_grad()
    def _targets(self, features: Tensor) -> Tensor:
        """Return the teacher's distributions (N, K) of its global features (N, D)."""
        logits, temperature = self.teacher.head(features), self.value_of(self.teacher_temperature)
        if self.centre is None:
            return sinkhorn_knopp(logits, temperature)
        self._means["centre"].append(logits.mean(dim=0))
        return centred_softmax(logits, self.centre, temperature)

    def _patch_loss(self, student: Tensor, taught: Tensor, masks: Drawn) -> Tensor:
        """Compute the loss of the masked patches from features (N, L, D) of all patches."""
        logits = self.head.of_patches(student.flatten(0, 1)[masks.places])  # (M, K)
        targets = self._patch_targets(taught.flatten(0, 1), masks.places)
        return ibot_loss(logits, targets, masks.weight, self.student_temperature)

    @torch.no_grad()
    def _patch_targets(self, features: Tensor, places: Tensor) -> Tensor:
        """Return the teacher's distributions (M, K) of the patches `places` of all its patches (N * L, D)."""
        head = self.teacher.head.of_patches
        temperature = self.value_of(self.patch_teacher_temperature or self.teacher_temperature, self.ibot_from_epoch)
        if self.patch_centre is None:
            return sinkhorn_knopp(head(features[places]), temperature)
        projected = head.project(features)
        # The last layer is linear without bias: the mean logit of all patches is the logit of their mean.
        self._means["patch_centre"].append(head.last_layer(projected.mean(dim=0)))
        return centred_softmax(head.last_layer(projected[places]), self.patch_centre, temperature)

    def _log_gauges(self, loss: Tensor, targets: Tensor, features: Tensor) -> None:
        """Log the gauges of a batch with targets (B, T, K), and teacher's features (B, D) of the first view."""
        gauges = divergence_gauges(loss, targets)
        for name, ramp in {"momentum": self.momentum, "teacher_temperature": self.teacher_temperature}.items():
            gauges[name] = torch.full((), self.value_of(ramp), device=self.device)  # for a number the host would wait
        if gauges_are_due(self.trainer):
            gauges |= costly_gauges(targets, features)
        self.log_dict({f"train/{name}": value for name, value in gauges.items()})

    def collapse_limits(self) -> list[CollapseLimit]:
        return teacher_limits(len(self.head.last_layer.weight), GlobalBatch.of(self.trainer).per_device)

    # Hooks of Lightning

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, except those in the encoder."""
        return {"mask_token"}

    def build_optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        return self.optimizer_settings.build(self, global_batch, self.layer_decay)

    def on_train_start(self) -> None:
        unused = {"masks": plain(Masks()), "patch_prototypes": None, "patch_teacher_temperature": None}
        named = [name for name, default in unused.items() if not self.ibot and self.hparams[name] != default]
        if named:
            rank_zero_only(_log.warning)("DINO: without model.ibot these have no effect: %s", ", ".join(named))
        if self.gram is not None and self.gram.first_step >= self._length[0]:
            rank_zero_only(_log.warning)(
                "DINO: Gram anchoring begins at step %d, and the run ends at %d; lower model.gram.first_step",
                self.gram.first_step, self._length[0],
            )  # fmt: skip

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.gram is not None and self.gram.snapshot_due(self.trainer.global_step):
            self.gram_teacher.update(0.0, self.teacher.encoder, self.gram_teacher.head)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.epochs_done() < self.freeze_last_layer_epochs:
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
        """Move a centre towards the mean of a step; a mean that is not finite, of a step that is skipped, leaves it."""
        centre.copy_(torch.where(mean.isfinite().all(), centre.lerp(mean, 1 - self.centre_momentum), centre))


def _tokens(maps: Tensor) -> Tensor:
    """Return maps (N, D, h, w) as patches (N, L, D) in raster order."""
    return maps.flatten(2).transpose(1, 2)


def _of_all(hidden: Tensor, views: torch.Size, num_global: int) -> Tensor:
    """Return masks (B * V, h, w) of all views (B, V) of one size, from those of the global views, (N, h, w)."""
    every = hidden.new_zeros(*views, *hidden.shape[1:])
    every[:, :num_global] = hidden.view(-1, num_global, *hidden.shape[1:])
    return every.flatten(0, 1)


def _check(settings: dict[str, Any]) -> None:
    """Raise an error for a setting that is out of range; those in data classes are checked there."""
    if settings["assign"] not in get_args(Assign):
        raise UserError(f"DINO: assign is {' or '.join(get_args(Assign))}; got {settings['assign']!r}. Choose one.")
    for name in ("teacher_temperature", "patch_teacher_temperature"):
        ramp = settings[name]
        if ramp is not None and not min(ramp.start, ramp.end) > 0:
            raise UserError(f"DINO: {name} is above 0; got {ramp}. 0.04 to 0.07 is usual.")
    momentum: Ramp = settings["momentum"]
    if not (0 <= momentum.start <= 1 and 0 <= momentum.end <= 1):
        raise UserError(f"DINO: momentum is in [0, 1]; got {momentum}. 0.996 to 1 is usual.")
    for name in ("freeze_last_layer_epochs", "ibot", "ibot_from_epoch", "koleo"):
        _require(0 <= settings[name] < math.inf, f"{name} is finite and at least 0", settings[name])
    temperature, kept, layers = (settings[one] for one in ("student_temperature", "centre_momentum", "layer_decay"))
    _require(0 < temperature < math.inf, "student_temperature is finite and above 0", temperature)
    _require(0 <= kept < 1, "centre_momentum is in [0, 1)", kept)
    _require(0 < layers <= 1, "layer_decay is in (0, 1]", layers)


def _require(holds: bool, what: str, got: float) -> None:
    if not holds:
        raise UserError(f"DINO: {what}; got {got}. Correct it.")
