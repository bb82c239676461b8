"""The base class of objectives: its encoder and its data."""

import logging
from pathlib import Path

import pytest
import torch
from clip_run import Pairs, fit_one_step, tiny_clip


@pytest.mark.parametrize(("mean", "said"), [([0.4, 0.5, 0.6], False), ([0.48, 0.46, 0.41], True)])
def test_other_images_than_the_encoder_has_seen_are_said(
    siglip_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mean: list[float],
    said: bool,
) -> None:
    monkeypatch.setattr(Pairs, "mean", mean)
    with caplog.at_level(logging.WARNING, logger="ssmpretrain"):
        fit_one_step(tmp_path, tiny_clip(encoder=None, encoder_args=None, init_from=str(siglip_run)))
    line = "has seen images of mean [0.4, 0.5, 0.6] and std [0.2, 0.25, 0.3]; those of the data have [0.48, 0.46, 0.41]"
    assert (line in caplog.text) == said


def test_an_encoder_rebuilt_for_the_data_has_the_weights_of_the_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    """Some strategies seed anew between the objective and its rebuilding, others do not."""
    models = []
    for drawn in (0, 7):
        model = tiny_clip(text={"locked": True})
        torch.rand(drawn)
        fit_one_step(tmp_path / str(drawn), model)
        assert tuple(model.encoder.patch_embed.img_size) == Pairs.image_size != (224, 224)
        models.append(model.encoder.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_classes_are_no_argument_of_the_encoder() -> None:
    with pytest.raises(ValueError, match="CLIP: encoder_args takes no num_classes"):
        tiny_clip(encoder_args={"num_classes": 10})
