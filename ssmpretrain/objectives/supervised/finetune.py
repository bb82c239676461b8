"""Supervised training, from a pretrained encoder or from scratch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.seeds import seed_of_run
from ssmpretrain.encoders.features.encoded import global_kind
from ssmpretrain.encoders.features.pooled import Pooled
from ssmpretrain.evaluation.accuracy import Accuracy
from ssmpretrain.objectives.supervised.mixing import mix
from ssmpretrain.objectives.supervised.supervised import Supervised, has_fresh_head
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule


class Finetune(Supervised):
    """Train the whole encoder and its head to classify images.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, such as `drop_path_rate`; they override those that `init_from`
            was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. None trains from scratch. The head in the file is kept if it has `num_classes`
            outputs, unless the file names other classes than the data.
        num_classes: Number of classes, at least 1. Labels are from 0 to num_classes - 1.
        head_init_std: Standard deviation of the weights of a fresh head, above 0; None keeps the initial values of the
            encoder.
        layer_decay: Factor on the learning rate from one layer of the encoder to the one below it, in (0, 1]. The head
            and the final norm have the full rate. Vim counts two blocks as one layer, see its `layer_decay_pairs`.
        mixup: alpha of mixup; 0 turns mixup off.
        cutmix: alpha of CutMix; 0 turns CutMix off.
        mixup_prob: Fraction of the batches that are mixed, in [0, 1], if either alpha is above 0.
        mixup_switch_prob: Fraction of the mixed batches that get CutMix, in [0, 1], if both alphas are above 0.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        channels_last: Whether to store images and the encoder's convolutions with the channels innermost in memory. The
            results stay the same. It can be faster on a GPU for encoders made of convolutions (ConvNeXt, MambaOut).
            Encoders with a single strided convolution (Vim, ARM, ViT) gain nothing.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    `forward` returns logits, so `OnlineEvaluation` on this objective evaluates the logits as features.

    Logs:
        train/loss: Cross-entropy with the (mixed, smoothed) targets.
        val/loss: Cross-entropy with the labels.
        val/top1, val/top5: Accuracy in [0, 1] over all validation images, each counted once.

    Raises:
        ValueError: If an argument is out of range, if neither `encoder` nor `init_from` is given, or if the file does
            not fill the encoder.

    Source: Touvron et al., "DeiT" (arXiv:2012.12877), the recipe of Vim and VMamba; He et al., "Masked Autoencoders Are
        Scalable Vision Learners" (arXiv:2111.06377), table 9.
    """

    optimizer_settings: AdamW

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        num_classes: int = 1000,
        head_init_std: float | None = None,
        layer_decay: float = 1.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        optimizer: AdamW = AdamW(lr_per_256=5e-4, betas=(0.9, 0.999)),  # noqa: B008  plain data, never changed
        schedule: Schedule = Cosine(warmup_epochs=5),  # noqa: B008
    ) -> None:
        _check(0 < layer_decay <= 1, "layer_decay is a factor in (0, 1]", layer_decay)
        _check(
            head_init_std is None or 0 < head_init_std < math.inf,
            "head_init_std is finite and above 0, or null",
            head_init_std,
        )
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            _check(0 <= alpha < math.inf, f"{name} is the alpha of a Beta distribution, or 0 for none", alpha)
        for name, fraction in (("mixup_prob", mixup_prob), ("mixup_switch_prob", mixup_switch_prob)):
            _check(0 <= fraction <= 1, f"{name} is a fraction in [0, 1]", fraction)
        _check(0 <= label_smoothing < 1, "label_smoothing is a fraction in [0, 1)", label_smoothing)
        super().__init__(
            encoder,
            encoder_args,
            init_from,
            num_classes,
            num_classes,
            optimizer,
            schedule,
            head_init_std=head_init_std,
            layer_decay=layer_decay,
            mixup=mixup,
            cutmix=cutmix,
            mixup_prob=mixup_prob,
            mixup_switch_prob=mixup_switch_prob,
            label_smoothing=label_smoothing,
            channels_last=channels_last,
        )
        self.layer_decay, self.label_smoothing, self.channels_last = layer_decay, label_smoothing, channels_last
        self.mixup: Mixup | None = None
        if mixup or cutmix:
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                mixup, cutmix, prob=mixup_prob, switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing, num_classes=num_classes,
            )  # fmt: skip
        self._accuracy = Accuracy("cpu")

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        if has_fresh_head(encoder):
            _redraw_head(encoder, self.hparams["head_init_std"])
        return encoder.to(memory_format=torch.channels_last) if self.hparams["channels_last"] else encoder

    def renew_head(self) -> None:
        super().renew_head()
        _redraw_head(self.encoder, self.hparams["head_init_std"])

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, num_classes) of images (B, 3, H, W)."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.encoder(images)  # type: ignore[no-any-return]

    @property
    def pooled(self) -> Pooled:
        """The global feature of the encoder, see `global_kind`: the one that its head reads."""
        return global_kind(self.encoder)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of logits (B, C) with labels (B,), after smoothing, or soft targets (B, C)."""
        smoothing = 0.0 if targets.ndim == 2 else self.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def build_optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        return self.optimizer_settings.build(self, global_batch, self.layer_decay)

    # Hooks of Lightning

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, targets = batch["image"], batch["label"]
        if self.mixup is not None:
            draw = (seed_of_run() or 0, self.current_epoch, batch_idx, self.global_rank)
            images, targets = mix(self.mixup, images, targets, draw)
        loss = self.loss(self(images), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._accuracy = Accuracy(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._accuracy.add(self(batch["image"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        result = self._accuracy.result(lambda part: self.trainer.strategy.reduce(part, reduce_op="sum"))
        for name, value in result.items():
            self.log(f"val/{name}", value, prog_bar=name != "top5")


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise UserError(f"Finetune: {what}; got {got}.")


def _redraw_head(encoder: Any, std: float | None) -> None:
    """Draw the weights of a head with the standard deviation `std`; None keeps them."""
    if std is None:
        return
    for module in encoder.get_classifier().modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
