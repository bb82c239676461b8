"""Semantic segmentation: a class for every pixel.

Legend: B images, K classes, H x W pixels.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.wording import few
from ssmpretrain.encoders.features.necks import MultiScale
from ssmpretrain.encoders.features.taps import Taps
from ssmpretrain.evaluation.dense import ConfusionMatrix, Inference, predict_classes
from ssmpretrain.objectives.dense.dense import Dense
from ssmpretrain.objectives.dense.heads import FCN, Head, UPerNet
from ssmpretrain.objectives.dense.pixel_loss import IGNORED, LossMean, pixel_cross_entropy
from ssmpretrain.objectives.dense.segmentation_report import report, table
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Poly, Schedule

_log = logging.getLogger(__name__)
_MEANS: tuple[LossMean, ...] = ("all", "labelled")


class Segmentation(Dense):
    """Train an encoder and a head to give every pixel a class.

    The training images have one size, `data.image_size`, which the positions of the encoder are resized to. Images of
    other sizes work too, at validation and in `forward`.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, such as `drop_path_rate`; they override those that `init_from`
            was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. None begins with fresh weights. The head always begins with fresh weights.
        num_classes: Number K of classes, 2 to 255. It is the number of the data's classes.
        taps: Maps of the encoder that the head reads, see `Taps`. By default a head that reads one map gets the last.
        head: The head, a kind of `Head`: UPerNet, Segmenter or Linear. UPerNet reads the stages of a pyramid, or four
            blocks of an encoder with one stride, which `MultiScale` turns into four strides. Options without a class
            path, as in `head: {channels: 256}`, are those of UPerNet, or of the head that an earlier recipe names.
        auxiliary: A second head with its own loss, in training only; null for none. Published with UPerNet: its
            defaults, `auxiliary: {}`.
        loss_mean: Number of pixels that the cross-entropy is divided by: "all" pixels, as mmsegmentation does and the
            published recipes with it, or the "labelled" pixels, as torch does.
        layer_decay: Factor on the learning rate from one layer of the encoder to the one below it, in (0, 1]. Heads,
            neck and the norms of the taps have the full rate.
        freeze_encoder: Whether the encoder stays as it is: in evaluation mode, without gradients and optimizer state.
        inference: Rule of the validation, see `Inference`: the whole image or sliding windows, scales, mirror image.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate, a kind of `Schedule`: Poly, Cosine or Steps.

    Logs:
        train/loss: Cross-entropy per pixel, and the weighted one of the auxiliary head.
        train/loss_auxiliary: Cross-entropy of the auxiliary head, before its weight; only with such a head.
        val/mIoU, val/mAcc, val/aAcc: Scores in [0, 1] over all validation images at the sizes of their files, exact
            over all ranks, see `SegmentationScores`. The scores of each class are in `segmentation.json` of the run.

    Raises:
        UserError: If an argument is out of range or has no effect, if neither `encoder` nor `init_from` is given, or if
            the file does not fill the encoder.
    """

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        num_classes: int = 150,
        taps: Taps = Taps(),  # noqa: B008  plain data, never changed
        head: Head = UPerNet(),  # noqa: B008
        auxiliary: FCN | None = None,
        loss_mean: LossMean = "all",
        layer_decay: float = 1.0,
        freeze_encoder: bool = False,
        inference: Inference = Inference(),  # noqa: B008
        optimizer: AdamW = AdamW(lr_per_256=9.6e-4, weight_decay=0.01, betas=(0.9, 0.999)),  # noqa: B008
        schedule: Schedule = Poly(warmup_steps=1500, initial_fraction=1e-6),  # noqa: B008
    ) -> None:
        if not 2 <= num_classes <= IGNORED:
            raise UserError(
                f"Segmentation: num_classes is from 2 to {IGNORED}, as a mask has 8 bits, and {IGNORED} in it is "
                f"ignored; got {num_classes}. Set it to the data's."
            )
        if not isinstance(head, Head):
            raise UserError(
                "Segmentation: head is a class path with init_args, such as "
                f"ssmpretrain.objectives.dense.heads.UPerNet; got {head!r:.60}. Leave it out for UPerNet."
            )
        if loss_mean not in _MEANS:
            raise UserError(f"Segmentation: loss_mean is one of {', '.join(_MEANS)}; got {loss_mean!r}.")
        if freeze_encoder and auxiliary is not None:
            raise UserError(
                "Segmentation: the auxiliary head trains the encoder, which freeze_encoder keeps as it is; got both. "
                "Set model.auxiliary to null, or model.freeze_encoder to false."
            )
        self._head, self._auxiliary = head, auxiliary  # settings, which `build_parts` reads
        self.loss_mean, self.inference = loss_mean, inference
        self._matrix: ConfusionMatrix | None = None  # of the running validation
        super().__init__(
            encoder,
            encoder_args,
            init_from,
            num_classes,
            taps,
            layer_decay,
            freeze_encoder,
            optimizer,
            schedule,
            head=head,
            auxiliary=auxiliary,
            loss_mean=loss_mean,
            inference=inference,
        )

    def build_parts(self) -> None:
        if self.taps.indices is None and not self._head.reads_pyramid:
            self.taps = replace(self.taps, indices=[-1])
        self.tapped = self.tap()
        channels, strides = self.tapped.channels, self.tapped.strides
        if self._head.reads_pyramid != (len(channels) > 1):
            reads, keep = ("several maps", "two or more") if self._head.reads_pyramid else ("one map", "one")
            raise UserError(
                f"Segmentation: {type(self._head).__name__} reads {reads}; got {len(channels)}, taps.indices "
                f"{self.taps.indices}. Give {keep}, or leave taps.indices out."
            )
        self.neck: nn.Module = nn.Identity()
        if self._head.reads_pyramid and len(set(strides)) == 1:
            self.neck = neck = MultiScale(channels, strides)
            channels, strides = neck.channels, neck.strides
        self.head = self._head.build(channels, self.num_classes)
        self.auxiliary: nn.Module | None = None
        self.strides = strides[:1]  # of the logits of each head
        if self._auxiliary is not None:
            self.auxiliary = self._auxiliary.build(channels, self.num_classes)
            self.strides = [strides[0], strides[self._auxiliary.map]]

    def check_kind(self, batch: dict[str, Any]) -> None:
        if "mask" not in batch:
            raise DataError(
                f"Segmentation: the data give a class map with each image; {type(self._data).__name__} gives "
                f"{', '.join(batch)}. Use SegmentationFolder or SegmentationShards."
            )

    # The method

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, C_i, h_i, w_i), finest first, that the heads read of images (B, 3, H, W)."""
        return self.neck(self.tapped(images))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, K, H, W), float32, of normalised images (B, 3, H, W) of any H and W."""
        return _at_pixels(self.head(self.maps(images)), self.strides[0], images)

    def losses(self, images: Tensor, classes: Tensor) -> list[Tensor]:
        """Compute the cross-entropy of each head, without weights, for images (B, 3, H, W) and classes (B, H, W)."""
        maps = self.maps(images)
        heads = [self.head] if self.auxiliary is None else [self.head, self.auxiliary]
        return [
            pixel_cross_entropy(_at_pixels(head(maps), stride, images), classes, self.loss_mean)
            for head, stride in zip(heads, self.strides, strict=True)
        ]

    # Hooks of Lightning

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        self.check_kind(batch)
        images, masks = batch["image"], batch["mask"]  # still on the CPU, where reading values costs nothing
        if masks.shape != images[:, 0].shape:
            raise DataError(
                f"Segmentation: a mask has the pixels of its image; got masks {tuple(masks.shape)} for images "
                f"{tuple(images.shape)}. Correct the data module."
            )
        for index, mask in enumerate((*masks, *batch.get("whole_mask", ()))):
            self._check_classes(mask, batch, index % len(masks))
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, *auxiliary = self.losses(batch["image"], batch["mask"])
        if self._auxiliary is not None:
            self.log("train/loss_auxiliary", auxiliary[0].detach())
            loss = loss + self._auxiliary.weight * auxiliary[0]
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        ranks.take_first(self.buffers())  # running statistics of rank 0, as in a checkpoint
        self._matrix = ConfusionMatrix(self.num_classes, IGNORED)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self._matrix is not None
        for index, (height, width) in enumerate(batch["size"].tolist()):
            image = batch["image"][index : index + 1, :, :height, :width]
            label = batch["whole_mask"][index] if "whole_mask" in batch else batch["mask"][index, :height, :width]
            predicted = predict_classes(self, image, self.inference, (label.shape[0], label.shape[1]))
            self._matrix.update(predicted, label)

    def on_validation_epoch_end(self) -> None:
        assert self._matrix is not None
        matrix, self._matrix = self._matrix.reduce(), None
        if self.trainer.sanity_checking:
            return
        if not matrix.counts.any():
            rank_zero_only(_log.warning)("Segmentation: no pixel of the validation images has a class; no scores")
            return
        scores = matrix.scores()
        for name, value in (("mIoU", scores.miou), ("mAcc", scores.macc), ("aAcc", scores.aacc)):
            self.log(f"val/{name}", value, prog_bar=name == "mIoU")
        newest = report(scores, self.classes, self.trainer.global_step)
        self.keep_report(newest, RunFolder(self.trainer.default_root_dir).segmentation)

    def describe_report(self, report: dict[str, Any]) -> str:
        return table(report)

    def _check_classes(self, mask: Tensor, batch: dict[str, Any], index: int) -> None:
        """Raise if a pixel of a mask (h, w) has a class that the head does not have."""
        wrong = mask[((mask < 0) | (mask >= self.num_classes)) & (mask != IGNORED)]
        if len(wrong):
            image = batch["key"][index] if "key" in batch else f"image {index} of a batch"
            values = sorted(set(wrong.tolist()))
            raise DataError(
                f"Segmentation: classes of pixels are 0 to {self.num_classes - 1}, or {IGNORED} to ignore; got "
                f"{few([str(value) for value in values])} at {len(wrong):,} pixels of {image}. Set model.num_classes "
                "to the data's, or map these classes with the class map of the data."
            )


def _at_pixels(logits: Tensor, stride: int, images: Tensor) -> Tensor:
    """Return logits (B, K, h, w) of positions at the pixels of the images: (B, K, H, W), float32."""
    h, w = logits.shape[-2:]
    H, W = images.shape[-2:]
    logits = F.interpolate(logits.float(), (h * stride, w * stride), mode="bilinear", align_corners=False)
    return logits[..., :H, :W]  # a map covers the padding too
