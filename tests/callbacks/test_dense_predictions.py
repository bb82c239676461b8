import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.callbacks import DensePredictions
from ssmpretrain.callbacks.dense_predictions import _annotated, _shown
from ssmpretrain.datamodules import SegmentationScenes
from ssmpretrain.evaluation.dense import class_colours
from ssmpretrain.objectives import Finetune, Segmentation
from ssmpretrain.objectives.dense.heads import UPerNet


class OneClass(Segmentation):
    """Predict one class everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), self.num_classes, *images.shape[2:])
        logits[:, 3] = 1
        return logits


@pytest.fixture
def validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Validate four images, and return the folder of the run."""
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))

    def run(callback: DensePredictions) -> Path:
        data = SegmentationScenes(train_images=4, val_images=4, image_size=32, batch_size=4, num_workers=0)
        model = OneClass("test_vmamba", {"embed_dim": 16, "depths": [1, 1]}, num_classes=7, head=UPerNet(channels=8))
        trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False,
                          enable_model_summary=False, default_root_dir=tmp_path / "run")  # fmt: skip
        trainer.validate(model, datamodule=data, verbose=False)
        return tmp_path / "run"

    return run


def test_the_picture_shows_images_labels_and_predictions(validate: Callable[..., Path]) -> None:
    path = validate(DensePredictions(num_images=2)) / "plots" / "predictions.png"
    picture = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    assert picture.shape[1] > 3 * 320 and picture.shape[0] > 2 * 320  # three panels, two images
    legend = (picture == np.array(class_colours(7)[3])).all(axis=-1)
    assert legend.any(), "the predicted class is in the legend"
    assert not (picture == np.array(class_colours(7)[0])).all(axis=-1).any(), "the background is left blank"


def test_fewer_images_make_a_lower_picture(validate: Callable[..., Path]) -> None:
    path = validate(DensePredictions(num_images=1)) / "plots" / "predictions.png"
    assert Image.open(path).height < 2 * 320


def test_images_are_shown_without_normalisation_and_padding() -> None:
    image = torch.full((1, 3, 8, 8), -1.0)
    image[:, :, :4, :6] = 0.5
    shown = _shown({"image": image, "size": torch.tensor([[4, 6]])}, 0, [0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    assert shown.shape == (3, 4, 6) and shown.dtype == torch.uint8 and shown.unique().tolist() == [153]  # 0.6 x 255


def test_boxes_of_a_batch_become_those_of_an_annotation() -> None:
    objects = {
        "boxes": torch.tensor([[2.0, 3.0, 10.0, 7.0]]),
        "classes": torch.tensor([4]),
        "crowd": torch.tensor([True]),
    }
    assert _annotated(objects) == {"objects": [{"bbox": [2.0, 3.0, 8.0, 4.0], "category": 4, "iscrowd": 1}]}


@pytest.mark.parametrize(("settings", "said"), [({"num_images": 0}, "at least 1; got 0"), ({"min_score": 2}, "got 2")])
def test_settings_out_of_range_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DensePredictions(**settings)


def test_an_objective_without_dense_predictions_is_refused() -> None:
    model = Finetune("test_vim", {"depth": 1, "img_size": 32}, num_classes=3)
    with pytest.raises(UserError, match="Finetune predicts neither class maps nor objects"):
        DensePredictions().setup(Trainer(logger=False, accelerator="cpu"), model, "fit")
