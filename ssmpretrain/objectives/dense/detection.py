"""Detection of objects, and of their masks, on the maps of any encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps
from ssmpretrain.evaluation.dense import DetectionRecords, paste_masks
from ssmpretrain.objectives.dense.dense import Dense
from ssmpretrain.objectives.dense.detection_report import table
from ssmpretrain.objectives.dense.detectors import (
    FINEST_OF_ONE_STAGE,
    Detector,
    Match,
    Neck,
    Target,
    build_detector,
    build_neck,
)
from ssmpretrain.objectives.dense.object_checks import (
    check_annotations,
    check_fields,
    check_objects,
    image_with_empty_box,
)
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)
_MOST_PADDED = 10_000  # pixels of a side


class Detection(Dense):
    """Train a detector of objects on an encoder: Mask R-CNN, Cascade Mask R-CNN, RetinaNet or FCOS.

    Images come from the data module resized, normalised and padded; nothing resizes or normalises them again. They are
    padded further, at the right and below, until the coarsest map of the encoder fits. Boxes and deltas are float32
    also under mixed precision. Crowds and boxes without width or height do not train; images without objects do.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, such as `drop_path_rate`; they override those that `init_from`
            was built with.
        init_from: Source of the encoder's weights, anything that `load_encoder` reads: a run, a checkpoint, an
            exported or a published file. None begins with fresh weights. Neck and detector begin with fresh weights.
        num_classes: Number of classes, without a background, at least 1.
        taps: Maps of the encoder that are read. By default the last block of an encoder with one stride, and all stages
            of a pyramid; RetinaNet and FCOS read its stages from stride 8.
        detector: Settings of the detector.
        neck: Settings of the pyramid between encoder and detector.
        match: Whose details the detector follows: "torchvision", "mmdet" or "detectron2"; see `Match`. RetinaNet and
            FCOS are torchvision's.
        eval_pad_to: Height and width in pixels to which smaller images are padded in evaluation, at the right and
            below. Published with large-scale jitter, whose training images have one size: [1024, 1024]. None pads only
            to the coarsest stride.
        layer_decay: Factor on the learning rate from one layer of the encoder to the one below it, in (0, 1]. Neck and
            detector have the full rate.
        freeze_encoder: Whether the encoder stays as it is, in evaluation mode.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss: Sum of all losses of a batch. train/loss_NAME: its parts: objectness, proposals, classes, boxes and
            masks; classes_1 to boxes_3 of the stages of a cascade; centres of FCOS.
        val/box_AP, val/box_AP50, ..., val/mask_AP, ...: Average precision and recall of COCO in [0, 1] over all
            validation images, each counted once, see `CocoScores`. Scores that are not defined are not logged. With
            the AP of each class they are in `detection.json` of the run's folder.

    Raises:
        ValueError: If an argument is out of range, if neither `encoder` nor `init_from` is given, or if the file does
            not fill the encoder.

    Source: He et al., "Mask R-CNN" (arXiv:1703.06870); Cai & Vasconcelos, "Cascade R-CNN" (arXiv:1906.09756); Li et
        al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527).
    """

    exported: ClassVar[tuple[str, str]] = ("maps", "map")

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        num_classes: int = 80,
        taps: Taps = Taps(),  # noqa: B008  (read only)
        detector: Detector = Detector(),  # noqa: B008
        neck: Neck = Neck(),  # noqa: B008
        match: str = "torchvision",
        eval_pad_to: tuple[int, int] | None = None,
        layer_decay: float = 1.0,
        freeze_encoder: bool = False,
        optimizer: AdamW = AdamW(lr_per_256=1.6e-3, betas=(0.9, 0.999)),  # noqa: B008  1e-4 for 16 images
        schedule: Schedule = Cosine(warmup_epochs=1),  # noqa: B008
    ) -> None:
        self._rules = Match.of(match)
        if eval_pad_to is not None and not all(1 <= side <= _MOST_PADDED for side in eval_pad_to):
            raise UserError(
                f"Detection: eval_pad_to is height and width, from 1 to {_MOST_PADDED:,} pixels; got "
                f"{list(eval_pad_to)}. Use [1024, 1024], say, or null."
            )
        self._settings, self._neck = detector, neck
        self.eval_pad_to = eval_pad_to
        self._records: DetectionRecords | None = None  # of the running validation
        self._told_of_empty_boxes = False
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
            detector=detector,
            neck=neck,
            match=match,
            eval_pad_to=None if eval_pad_to is None else list(eval_pad_to),
        )

    def build_parts(self) -> None:
        self.tapped = self.tap()
        one_stage = not self._settings.kind.stages
        self.neck = build_neck(self._neck, self.tapped.channels, self.tapped.strides, one_stage)
        self.detector = build_detector(
            self._settings, self._rules, self.num_classes, self._neck.width, self.neck.strides
        )

    def tap(self) -> TappedEncoder:
        if self.taps.indices is None:
            strides = [info["reduction"] for info in self.encoder.feature_info]
            finest = 0 if self._settings.kind.stages else FINEST_OF_ONE_STAGE
            stages = [number for number, stride in enumerate(strides) if stride >= finest]
            self.taps = replace(self.taps, indices=[-1] if len(set(strides)) == 1 else stages)
        return super().tap()

    def check_kind(self, batch: dict[str, Any]) -> None:
        check_fields(batch, "objects", "size")

    # The method

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, h, w), float32, finest first, that the detector reads of images (B, 3, H, W)."""
        H, W = images.shape[-2:]
        multiple = self.neck.multiple
        images = F.pad(images, (0, -W % multiple, 0, -H % multiple))
        return self.neck(self.tapped(images))  # type: ignore[no-any-return]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the losses by name of a batch with `image`, `objects` and `size`."""
        targets = [Target.of(objects) for objects in batch["objects"]]
        return self.detector(self.maps(batch["image"]), _sizes(batch["size"]), targets)  # type: ignore[no-any-return]

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
        """Detect the objects in images, in evaluation mode.

        Each image is computed alone, without the padding of its batch. A scan passes through the padding, so the
        detections would otherwise depend on the other images of the batch.

        Args:
            images: Normalised images, padded at the right and below, (B, 3, H, W).
            sizes: Height and width in pixels of each image without its padding, (B, 2).

        Returns:
            For each image a dict with the n detections, best first: boxes (n, 4), corners x1, y1, x2, y2 in pixels of
            the batch's image, float32; scores (n,) in [0, 1]; classes (n,), int64; masks (n, 28, 28), probabilities of
            a grid over each box, if the detector has masks.
        """
        found = [
            self._detect_alone(image[None, :, :h, :w]) for image, (h, w) in zip(images, _sizes(sizes), strict=True)
        ]
        return [{name: part if name == "classes" else part.float() for name, part in one.items()} for one in found]

    def _detect_alone(self, image: Tensor) -> dict[str, Tensor]:
        """Detect the objects in one image (1, 3, h, w) without padding."""
        h, w = image.shape[-2:]
        H, W = self.eval_pad_to or (0, 0)
        (found,) = self.detector(self.maps(F.pad(image, (0, max(0, W - w), 0, max(0, H - h)))), [(h, w)])
        return found  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Detect the objects in images (B, 3, H, W) without padding; see `detect`."""
        return self.detect(images, [list(images.shape[-2:])] * len(images))

    # Hooks of Lightning

    def configure_model(self) -> None:
        super().configure_model()
        DetectionRecords()  # raises now if the evaluator is not installed, not after an epoch

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if unused := self._settings.unused:
            rank_zero_only(_log.warning)(
                "Detection: %s does not use %s; leave out what has no effect",
                self._settings.name, ", ".join(f"model.detector.{name}" for name in unused),
            )  # fmt: skip

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        needs_masks = self._settings.kind.masks and self.trainer.training  # in evaluation the annotations have them
        check_objects(batch, self.num_classes, needs_masks=needs_masks)
        if not self._told_of_empty_boxes and (key := image_with_empty_box(batch)) is not None:
            self._told_of_empty_boxes = True
            _log.warning("Detection: boxes without width or height do not train; the first is in %s", key)
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        for name, part in losses.items():
            self.log(f"train/loss_{name}", part.detach())
        return loss

    def on_validation_epoch_start(self) -> None:
        self._records = DetectionRecords()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self._records is not None
        check_annotations(batch, self.num_classes, needs_masks=self._settings.kind.masks)
        found = self.detect(batch["image"], batch["size"])
        scales = (batch["whole_size"] / batch["size"]).flip(1).repeat(1, 2)  # of x, y, x, y
        for key, annotation, one, scale in zip(batch["key"], batch["annotation"], found, scales, strict=True):
            boxes = one["boxes"] * scale.to(one["boxes"])
            masks = None
            if "masks" in one:
                masks = paste_masks(one["masks"], boxes, annotation["height"], annotation["width"])
            self._records.add(key, annotation, boxes, one["scores"], one["classes"], masks)

    def on_validation_epoch_end(self) -> None:
        assert self._records is not None
        names = self.classes or [str(number) for number in range(self.num_classes)]
        records, self._records = self._records.gather(), None
        if self.trainer.sanity_checking or not len(records):
            return
        scores = records.evaluate(names)
        for name, value in scores.named().items():
            self.log(f"val/{name}", value, prog_bar=name in ("box_AP", "mask_AP"))
        newest = {"step": self.trainer.global_step, "match": self._rules.name, **scores.plain()}
        self.keep_report(newest, RunFolder(self.trainer.default_root_dir).detection)

    def describe_report(self, report: dict[str, Any]) -> str:
        return table(report)


def _sizes(sizes: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]
