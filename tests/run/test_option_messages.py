"""Errors of options: the message gives the option, the values it takes and the given value."""

import re
from pathlib import Path

import pytest

from ssmpretrain.cli import main


@pytest.mark.parametrize("option", ("--seed", "--k", "--max-bank", "--batch-size"))
def test_a_number_that_no_machine_takes_is_refused_in_every_option(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (10**20, -(10**20)):
        assert main(["knn", "RUN", f"{option}={number}"]) == 2
        assert f"{option} is a number of at most 64 bits; got {number}" in capsys.readouterr().err
    assert main(["knn", "RUN", option, "9" * 5000]) == 2
    assert len(capsys.readouterr().err) < 500


RECIPE = """
model: {class_path: ssmpretrain.objectives.MAE, init_args: {encoder: test_vim, decoder_embed_dim: 32}}
data:
  class_path: ssmpretrain.datamodules.Shapes
  init_args: {train_images: 48, val_images: 48, image_size: 32, batch_size: 4, num_workers: 0}
trainer: {accelerator: cpu, devices: 1, max_epochs: 1}
"""


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    (
        ("model.optimizer.betas", "[.nan,0.9]", "model.optimizer.betas: is a finite number; got [nan, 0.9]."),
        ("model.optimizer.betas", "[0.9,-.inf]", "model.optimizer.betas: is a finite number; got [0.9, -inf]."),
        ("model.optimizer.betas", "[nano,0.9]", "model.optimizer.betas: takes a number; got \"['nano', 0.9]\"."),
        ("model", "[1, 2]", "model: takes a class by its full name, or class_path with init_args; got '[1, 2]'."),
        ("data.epoch_samples", "3", "got batch_size 4 and epoch_samples 3. Raise it"),
        (
            "trainer.devices",
            "abc",
            "devices is a whole number, a list of devices such as 0,1, or auto; got 'abc'",
        ),
        ("trainer.devices", "3.5", "trainer: devices is a whole number"),
        ("trainer.devices", "[0,x]", "trainer: devices is a whole number"),
        ("data.batch_size", "9" * 5000, "64 bits; got one of 5,000 characters"),
        ("model.encoder_args", "&a {x: *a}", "an alias stands for"),
        ("model.decoder_embed_dim", "100000000", "decoder_embed_dim is at most 16,384"),
        ("run_dir", "x" * 5000, "(5,0"),
        ("config", "trainer.yaml", "trainer: takes options by name, as `{max_epochs: 3}`; got 3."),
        ("config", "nul.yaml", "nul.yaml:1: no text or path holds a NUL character"),
    ),
)
def test_a_wrong_value_is_told_with_what_holds(
    option: str, value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in (("r", RECIPE), ("trainer", "trainer: 3\n"), ("nul", 'run_dir: "a\\0b"\n')):
        Path(f"{name}.yaml").write_text(text)
    assert main(["fit", "--config", "r.yaml", f"--{option}", value]) == 2
    message = "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("ssmpretrain: "))
    assert expected in message
    assert len(message) < 800 and "fault of ours" not in message


DENSE = """
model:
  class_path: ssmpretrain.objectives.Segmentation
  init_args: {encoder: test_vim, head: {class_path: ssmpretrain.objectives.dense.heads.Linear}}
data:
  class_path: ssmpretrain.datamodules.%s
  init_args: {train: a, %s}
"""
OF_SEGMENTATION = "augmentation.flip: no such option. Known options: resize, scale, category_ratio"


@pytest.mark.parametrize(
    ("module", "settings", "options", "expected"),
    (
        ("SegmentationFolder", "augmentation: {flip: true}", [], f"r.yaml:7: data.{OF_SEGMENTATION}"),
        ("SegmentationFolder", "val: b", ["--data.augmentation", "{flip: true}"], OF_SEGMENTATION),
        ("SegmentationShards", "val: b", ["--data.augmentation.flip", "true"], OF_SEGMENTATION),
        (
            "SegmentationFolder",
            "augmentation: {distortion: {hu: 9}}",
            [],
            "distortion.hu: no such option. Did you mean 'hue'?",
        ),
        ("CocoDetection", "augmentation: {flip: true}", [], "Known options: horizontal_flip, short_sides"),
        (
            "CocoDetection",
            "augmentation: {class_path: ssmpretrain.datamodules.LargeScaleJitter, init_args: {flip: true}}",
            [],
            "r.yaml:7: data.augmentation.flip: no such option. Known options: horizontal_flip, scale.",
        ),
        (
            "SegmentationFolder",
            "val: b",
            ["--model.head", "{channels: 32}"],
            "channels: Linear takes no options. Leave",
        ),
        (
            "SegmentationFolder",
            "val: b",
            ["--model.taps.ind", "3"],
            "taps.ind: no such option. Did you mean 'indices'?",
        ),
        ("SegmentationFolder", "val: b", ["--data.augmentatio.flip", "1"], "augmentatio.flip: no such option. Did you"),
    ),
)
def test_an_unknown_option_of_a_group_names_the_options_of_the_group(
    module: str, settings: str, options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(DENSE % (module, settings))
    assert main(["fit", "--config", "r.yaml", *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    (
        ["knn", "RUN", "--repeats", "10_000_000"],
        ["erf", "RUN", "--num-images", "1_000_000_000"],
        ["plan", "--simulate", "4", "3_000_000_000_000_000_000"],
        ["plan", "--simulate", "4", "100", "--batch-size", "2", "--epoch-samples", "1_000_000_000_000_000_000"],
    ),
)
def test_a_number_that_would_take_all_memory_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert re.search(r"(at most|from 1 to) [\d,]+; got [\d,]+", message), message


@pytest.mark.parametrize(
    ("option", "setting", "expected"),
    (
        ("detector.nms", "detector: {nms: 0.5}", "model.detector.nms: no such option. Did you mean 'nms_iou'?"),
        (
            "detector.mask_head.head",
            "detector: {mask_head: {head: 0.5}}",
            "model.detector.mask_head.head: no such option. Did you mean 'heads'?",
        ),
        ("optimizer.lr", "optimizer: {lr: 0.5}", "model.optimizer.lr: no such option. Did you mean 'lr_per_256'?"),
        ("detecto.name", "detecto: {name: 0.5}", "model.detecto.name: no such option. Did you mean 'detector'?"),
    ),
)
def test_an_unknown_setting_is_named_in_full_with_the_one_that_begins_like_it(
    option: str, setting: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = "model: {class_path: ssmpretrain.objectives.Detection, init_args: {%s}}\n"
    Path("r.yaml").write_text(model % "encoder: test_vmamba")
    assert main(["fit", "--config", "r.yaml", f"--model.{option}", "0.5"]) == 2
    assert f"ssmpretrain: {expected}" in capsys.readouterr().err
    Path("r.yaml").write_text(model % f"encoder: test_vmamba, {setting}")
    assert main(["fit", "--config", "r.yaml"]) == 2
    assert f"ssmpretrain: r.yaml:1: {expected}" in capsys.readouterr().err
