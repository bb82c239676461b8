"""What every objective does with its encoder and its data."""

import logging
from pathlib import Path

import pytest
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
