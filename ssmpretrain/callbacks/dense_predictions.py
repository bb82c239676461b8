"""Pictures of the predictions of segmentation and detection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.io import encode_png

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder, takes_results
from ssmpretrain.base.whole_files import replacing
from ssmpretrain.evaluation.dense import draw_detections, draw_segmentation, paste_masks, predict

_log = logging.getLogger(__name__)


class DensePredictions(Callback):
    """Draw the first validation images, their labels and the predictions after every validation.

    The picture `plots/predictions.png` in the run's folder always shows the newest validation. `num_images` images of
    the first validation batch stand below each other. The command `validate` does not replace the picture of a run.

    Args:
        num_images: Images in the picture, at least 1.
        min_score: Least score in [0, 1] of a detection that is drawn.
    """

    observes_only = True

    def __init__(self, num_images: int = 4, min_score: float = 0.5) -> None:
        if num_images < 1:
            raise UserError(f"DensePredictions: num_images is at least 1; got {num_images}.")
        if not 0 <= min_score <= 1:
            raise UserError(f"DensePredictions: min_score is in [0, 1]; got {min_score}.")
        self.num_images, self.min_score = num_images, min_score
        self._batch: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not (hasattr(pl_module, "inference") or hasattr(pl_module, "detect")):
            raise UserError(
                f"DensePredictions: {type(pl_module).__name__} predicts neither class maps nor objects. Leave the "
                "callback out, or use Segmentation or Detection."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._batch = batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batch, self._batch = self._batch, None
        if trainer.sanity_checking or not trainer.is_global_zero or batch is None or not takes_results(trainer):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        draw = _objects if hasattr(pl_module, "detect") else _class_map
        with torch.no_grad():
            sheets = [
                draw(pl_module, batch, index, _shown(batch, index, data.mean, data.std), self.min_score)
                for index in range(min(self.num_images, len(batch["image"])))
            ]
        path = RunFolder(trainer.default_root_dir).predictions
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(encode_png(_stacked(sheets)).numpy().tobytes())
        except OSError as error:
            _log.warning("%s: not drawn: %s", path, error.strerror)


def _shown(batch: dict[str, Any], index: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an image of a batch without padding and normalisation: (3, h, w), uint8, on the CPU."""
    height, width = batch["size"][index].tolist()
    shift, scale = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    pixels = batch["image"][index, :, :height, :width].float().cpu() * scale + shift
    shown: Tensor = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return shown


def _class_map(model: Any, batch: dict[str, Any], index: int, image: Tensor, _: float) -> Tensor:
    """Draw an image beside its labels and the predicted class map; a class called background is left blank."""
    height, width = image.shape[1:]
    normalised = batch["image"][index : index + 1, :, :height, :width]
    predicted = predict(model, normalised, model.inference, (height, width)).argmax(0)
    names, maps = _names(model), [predicted, batch["mask"][index, :height, :width]]
    drawn, labels = (each.long().cpu().clone() for each in maps)
    for classes in (drawn, labels):
        if "background" in names:
            classes[classes == names.index("background")] = -1
    return draw_segmentation(image, drawn, names, labels)


def _objects(model: Any, batch: dict[str, Any], index: int, image: Tensor, min_score: float) -> Tensor:
    """Draw an image beside its objects and the detected ones."""
    height, width = image.shape[1:]
    one = model.detect(batch["image"][index : index + 1], batch["size"][index : index + 1])[0]
    sure = one["scores"] >= min_score
    boxes, scores, classes = (one[name][sure].float().cpu() for name in ("boxes", "scores", "classes"))
    masks = paste_masks(one["masks"][sure].cpu(), boxes, height, width) if "masks" in one else None
    return draw_detections(
        image, boxes, scores, classes.long(), masks, _names(model), _annotated(batch["objects"][index])
    )


def _annotated(objects: dict[str, Tensor]) -> dict[str, Any]:
    """Return the boxes of a batch's image in the terms of an annotation."""
    corners = objects["boxes"].cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    rows = zip(boxes, objects["classes"].tolist(), objects["crowd"].tolist(), strict=True)
    return {"objects": [{"bbox": box, "category": k, "iscrowd": int(crowd)} for box, k, crowd in rows]}


def _names(model: Any) -> list[str]:
    return model.classes or [f"class {number}" for number in range(model.num_classes)]


def _stacked(sheets: Sequence[Tensor]) -> Tensor:
    """Put pictures (3, h, w) below each other, on white."""
    width = max(sheet.shape[2] for sheet in sheets)
    return torch.cat([F.pad(sheet, (0, width - sheet.shape[2]), value=255) for sheet in sheets], dim=1)
