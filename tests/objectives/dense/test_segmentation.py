"""Segmentation: every encoder, one run through the trainer, its checkpoint, and scores worked by hand."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from painted import CLASSES, Painted, batch, painted, twice
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import write_png

from ssmpretrain import load_encoder
from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.datamodules import SegmentationFolder, Shapes
from ssmpretrain.encoders.features.taps import Taps
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.evaluation.dense import Inference
from ssmpretrain.objectives import Segmentation
from ssmpretrain.objectives.dense.heads import FCN, Linear, Segmenter, UPerNet
from ssmpretrain.objectives.dense.pixel_loss import IGNORED
from ssmpretrain.objectives.dense.segmentation import _at_pixels
from ssmpretrain.objectives.restore import restore
from ssmpretrain.training.optim import AdamW, Poly, Steps

ENCODERS: dict[str, dict[str, Any]] = {
    "test_vim": {}, "test_vmamba": {}, "test_vmamba2": {}, "test_arm": {}, "mambaout_femto": {}, "test_vit": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
}  # fmt: skip
SMALL = {"patch_size": 8, "depth": 4}


def model(**settings: Any) -> Segmentation:
    torch.manual_seed(0)
    common = {"head": UPerNet(16), "optimizer": AdamW(lr_per_256=0.3), "schedule": Poly()}
    encoder = {} if "init_from" in settings else {"encoder": "test_vim", "encoder_args": dict(SMALL)}
    return Segmentation(**{**encoder, "num_classes": 3, **common, **settings})


def trainer(folder: Path, **options: Any) -> Trainer:
    common = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **common,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Segmentation, dict[str, Tensor]]:
    """A run of two epochs with an auxiliary head: its folder, the objective, the logged values."""
    folder = tmp_path_factory.mktemp("segmentation")
    fit, segmentation = trainer(folder), model(auxiliary=FCN(8))
    fit.fit(segmentation, datamodule=Painted())
    fit.save_checkpoint(folder / "last.ckpt")
    return folder, segmentation, fit.callback_metrics


# Every encoder


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_trains_all_its_parameters_and_takes_any_size(name: str) -> None:
    segmentation = Segmentation(name, ENCODERS[name], num_classes=3, head=UPerNet(8), auxiliary=FCN(8), layer_decay=0.9)
    images = torch.randn(2, 3, 45, 70)
    classes = torch.randint(3, (2, 45, 70), dtype=torch.uint8)
    torch.stack(segmentation.losses(images, classes)).sum().backward()
    trained = {name: one for name, one in segmentation.named_parameters() if one.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert sum(name.startswith("encoder.") for name in trained) > 10
    assert segmentation.eval()(images[:1, :, :33]).shape == (1, 3, 33, 70)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_does_not_blow_up_the_gradients_of_fresh_weights(name: str) -> None:
    torch.manual_seed(0)
    segmentation = Segmentation(name, ENCODERS[name], num_classes=3, head=UPerNet(8), auxiliary=FCN(8))
    images, classes = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64), dtype=torch.uint8)
    images[..., 32:, :], classes[..., 32:, :] = 0, IGNORED
    torch.stack(segmentation.losses(images, classes)).sum().backward()
    norms = {name: float(one.grad.norm()) for name, one in segmentation.named_parameters() if one.grad is not None}
    assert {name: norm for name, norm in norms.items() if not norm < 100} == {}


@pytest.mark.parametrize("head", [Segmenter(), Linear()])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_heads_of_one_map_read_the_last(name: str, head: Any) -> None:
    segmentation = Segmentation(name, num_classes=3, head=head)
    assert len(segmentation.tapped.channels) == 1
    assert segmentation.strides == [16 if name == "test_vim" else 32]
    assert segmentation.eval()(torch.randn(1, 3, 50, 34)).shape == (1, 3, 50, 34)


def test_logits_of_the_padding_are_cut_off() -> None:
    logits = torch.arange(4.0).view(1, 1, 2, 2)
    whole = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(_at_pixels(logits, 4, torch.zeros(1, 3, 5, 7)), whole[..., :5, :7])


# Training


def test_steps_on_a_fixed_batch_lower_the_loss() -> None:
    segmentation = model(auxiliary=FCN(8))
    one = batch([0, 1], [(32, 32), (32, 32)])
    optimizer = segmentation.build_optimizer(8)
    losses = []
    for _ in range(8):
        loss = torch.stack(segmentation.losses(one["image"], one["mask"])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_adds_the_weighted_loss_of_the_auxiliary_head(run: tuple[Path, Segmentation, Any]) -> None:
    _, segmentation, logged = run
    assert {"train/loss", "train/loss_auxiliary", "val/mIoU", "val/mAcc", "val/aAcc"} <= set(logged)
    one, values = batch([0, 1], [(32, 32), (32, 32)]), {}
    twin = segmentation.eval().twin("")
    vars(twin)["log"] = lambda name, value, **_: values.update({name: value.item()})
    main, auxiliary = (loss.item() for loss in segmentation.losses(one["image"], one["mask"]))
    assert twin.training_step(one, 0).item() == pytest.approx(main + 0.4 * auxiliary)
    assert values == pytest.approx({"train/loss": main + 0.4 * auxiliary, "train/loss_auxiliary": auxiliary})


def test_heads_have_the_full_rate_and_norms_no_weight_decay() -> None:
    segmentation = Segmentation("test_vmamba", num_classes=3, head=UPerNet(8), layer_decay=0.5)
    groups = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in segmentation.build_optimizer(16).param_groups
        for name in group["param_names"]
    }
    assert groups["head.fusion.0.weight"] == (1.0, 0.01) and groups["head.fusion.1.weight"] == (1.0, 0.0)
    assert groups["tapped.norms.0.weight"] == (1.0, 0.0)
    scales = {scale for name, (scale, _) in groups.items() if name.startswith("encoder.")}
    assert max(scales) == 0.5 and len(scales) > 3
    assert not [name for name in groups if name.startswith("tapped.encoder")]


def test_a_frozen_encoder_keeps_every_bit_its_mode_and_no_state(
    run: tuple[Path, Segmentation, Any], tmp_path: Path
) -> None:
    path = run[0] / "last.ckpt"
    before = load_encoder(path).state_dict()
    segmentation, fit = model(init_from=str(path), freeze_encoder=True), trainer(tmp_path, max_epochs=1)
    fit.fit(segmentation, datamodule=Painted())
    assert all(torch.equal(value, before[name]) for name, value in segmentation.encoder.state_dict().items())
    segmentation.train()
    assert segmentation.head.training and not any(module.training for module in segmentation.encoder.modules())
    trained = {id(one) for one in segmentation.encoder.parameters()}
    assert fit.optimizers[0].state and not trained & {id(one) for one in fit.optimizers[0].state}


def test_it_trains_in_bfloat16(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    segmentation = model(head=Segmenter(depth=1))
    fit.fit(segmentation, datamodule=Painted(steps=1))
    assert fit.callback_metrics["train/loss"].isfinite() and fit.callback_metrics["val/mIoU"] > 0


class Killed(Exception):
    """Stand-in for the end of the process."""


class Dies(Callback):
    """Saves after a step, and ends the process."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            raise Killed


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A data set of six training images and two validation images in the layout "folders"."""
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        for number in numbers:
            image, mask = painted(number, 40, 48)
            for kind, pixels in (("images", image.mul(60).add(128).clamp(0, 255).byte()), ("masks", mask[None])):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                write_png(pixels, str(tmp_path / kind / split / f"{number}.png"))
    return tmp_path


@pytest.mark.parametrize(
    ("step", "schedule"),  # within an epoch, and at its end
    [(2, Poly(power=0.9, warmup_steps=2)), (3, Steps(milestone_epochs=[1]))],
)
def test_a_continued_run_is_equal_to_the_last_bit(step: int, schedule: Any, folders: Path) -> None:
    def fit(path: Path | None = None, **options: Any) -> dict[str, Tensor]:
        data = SegmentationFolder(
            str(folders), str(folders), layout="folders", classes=list(CLASSES), batch_size=2, num_workers=0,
            image_size=32,
        )  # fmt: skip
        segmentation = model(auxiliary=FCN(8), schedule=schedule)
        trainer(folders, **options).fit(segmentation, data, ckpt_path=path, weights_only=True)
        return segmentation.state_dict()

    whole = fit()
    with pytest.raises(Killed):
        fit(callbacks=[Dies(step)])
    again = fit(folders / "stopped.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


# Validation


class ByBrightness(Segmentation):
    """Predicts the class of a pixel from its brightness."""

    def forward(self, images: Tensor) -> Tensor:
        levels = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
        return -10 * (images.mean(1, keepdim=True) - levels).abs()


class Clean(Painted):
    """Images without noise, whose padding looks like class 2."""

    def val_dataloader(self) -> Any:
        one = batch([7, 8], [(24, 40), (40, 16)])
        one["image"] = one["mask"].float().unsqueeze(1).expand(-1, 3, -1, -1) - 1
        one["image"][one["image"] > 1] = 1.0  # ignored pixels and padding
        one["whole_mask"] = [twice(painted(7, 24, 40)[1]), twice(painted(8, 40, 16)[1])]
        one["whole_mask"][0][:2] = 2  # wrong from here on: as many pixels as are counted below
        return DataLoader([one], batch_size=None)


def test_scores_are_of_the_pixels_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segmentation = ByBrightness("test_vim", SMALL, num_classes=3, head=Linear())
    fit = trainer(tmp_path)
    fit.validate(segmentation, datamodule=Clean(), verbose=False)
    (one,) = Clean().val_dataloader()
    labels = one["whole_mask"]
    truth = [twice(painted(7, 24, 40)[1]), twice(painted(8, 40, 16)[1])]  # the predictions, where not ignored
    pairs = torch.zeros(3, 3)
    for label, predicted in zip(labels, truth, strict=True):
        for true, other in zip(label.flatten().tolist(), predicted.flatten().tolist(), strict=True):
            if true != 255:
                pairs[true, min(other, 2)] += 1
    iou = pairs.diagonal() / (pairs.sum(0) + pairs.sum(1) - pairs.diagonal())
    assert pairs.sum() == sum(int((label != 255).sum()) for label in labels)
    assert float(fit.callback_metrics["val/mIoU"]) == pytest.approx(float(iou.mean()), abs=1e-6) and iou.mean() < 1
    assert float(fit.callback_metrics["val/aAcc"]) == pytest.approx(float(pairs.diagonal().sum() / pairs.sum()))
    written = json.loads((tmp_path / "segmentation.json").read_text())
    assert [one["name"] for one in written["classes"]] == list(CLASSES)
    assert written["classes"][2]["IoU"] == pytest.approx(float(iou[2]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("mIoU ") and printed[-2].split()[0] == "white"


def test_the_validation_follows_the_rule_of_inference(tmp_path: Path) -> None:
    inference = Inference(slide=True, window=(16, 16), stride=(8, 8), scales=(0.5, 1.0), flip=True)
    fit = trainer(tmp_path)
    fit.validate(model(inference=inference), datamodule=Painted(val=(1,)), verbose=False)
    assert 0 <= float(fit.callback_metrics["val/mIoU"]) <= 1


def test_a_validation_without_labels_is_told_and_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unlabelled(Painted):
        def val_dataloader(self) -> Any:
            one = batch([7], [(24, 40)])
            return DataLoader([{**one, "mask": torch.full_like(one["mask"], 255)}], batch_size=None)

    fit = trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        fit.validate(model(), datamodule=Unlabelled(), verbose=False)
    assert "no pixel of the validation images has a class" in caplog.text and not fit.callback_metrics


# Checkpoints


def test_a_checkpoint_holds_the_encoder_once_the_classes_and_the_whole_objective(
    run: tuple[Path, Segmentation, Any],
) -> None:
    folder, segmentation, _ = run
    content = read_content(folder / "last.ckpt")
    assert content["classes"] == list(CLASSES) and content["images"]["size"] == [32, 32]
    names = content["state_dict"]
    assert any(name.startswith("encoder.") for name in names) and not any("tapped.encoder" in name for name in names)
    encoder = load_encoder(folder / "last.ckpt")
    assert encoder.load_report.fresh == ()
    assert torch.equal(encoder.pos_embed, segmentation.encoder.pos_embed)
    restored = restore(content, folder / "last.ckpt", Segmentation)
    assert restored is not None
    images = torch.randn(1, 3, 40, 30)
    assert torch.equal(restored.model(images), segmentation.eval()(images))


def test_data_with_other_classes_are_refused_at_the_checkpoint(
    run: tuple[Path, Segmentation, Any], tmp_path: Path
) -> None:
    for classes, message in (
        (("ground", "white", "grey"), "class 1 is 'grey' in the checkpoint.* 'white' in the data"),
        (
            ("ground", "grey"),
            r"the number of the data's classes; got 3 and 2 classes \(ground, grey\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).validate(
                model(auxiliary=FCN(8)), datamodule=Painted(classes=classes), ckpt_path=run[0] / "last.ckpt",
                verbose=False, weights_only=True,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": UPerNet(8)}, "got other settings: head.channels 16, now 8. Set these"),
        ({"head": Segmenter(), "auxiliary": None}, "got other settings: head UPerNet, now Segmenter; auxiliary {"),
    ],
)
def test_another_head_than_the_checkpoints_is_told_by_its_settings(
    settings: dict[str, Any], message: str, run: tuple[Path, Segmentation, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).validate(
            model(**{"auxiliary": FCN(8), **settings}), datamodule=Painted(), ckpt_path=run[0] / "last.ckpt",
            verbose=False, weights_only=True,
        )  # fmt: skip


def test_only_the_encoder_is_taken_from_another_run_which_is_told(
    run: tuple[Path, Segmentation, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segmentation = model(init_from=str(run[0] / "last.ckpt"), head=Linear())
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_epochs=1).fit(segmentation, datamodule=Painted(steps=1))
    assert "a run of Segmentation; all other parts begin with fresh weights" in caplog.text


# Wrong settings and data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes is from 2 to 255, .*; got 1"),
        ({"num_classes": 256}, "num_classes is from 2 to 255, .*; got 256"),
        ({"loss_mean": "some"}, "loss_mean is one of all, labelled; got 'some'"),
        ({"layer_decay": 0.0}, r"layer_decay is a factor in \(0, 1\]; got 0.0"),
        ({"layer_decay": 0.5, "freeze_encoder": True}, "layer_decay changes .* which freeze_encoder keeps"),
        ({"auxiliary": FCN(), "freeze_encoder": True}, "auxiliary head trains the encoder, which freeze_encoder keeps"),
        ({"head": None}, "head is a class path with init_args, .*; got None"),
        ({"schedule": None}, "schedule holds options by name, or class_path with init_args; got None"),
        ({"head": Linear(), "taps": Taps([0, 1])}, r"Linear reads one map; got 2, taps.indices \[0, 1\]"),
        ({"encoder": None}, "the encoder comes by its name or from a checkpoint; got neither"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Segmentation: .*{message}"):
        model(**settings)


def test_data_of_another_task_are_told_before_their_number_of_classes(tmp_path: Path) -> None:
    data = Shapes(train_images=8, val_images=8, image_size=32, batch_size=4, num_workers=0)
    assert len(data.classes) != 3
    for start in (trainer(tmp_path).fit, trainer(tmp_path).validate):
        with pytest.raises(DataError, match="a class map with each image; Shapes gives image, label"):
            start(model(), datamodule=data)
    with pytest.raises(UserError, match=r"got 4 and 3 classes .*Set model.num_classes to 3"):
        trainer(tmp_path).fit(model(num_classes=4), datamodule=Painted())


def test_a_class_that_the_head_lacks_is_told_with_its_image() -> None:
    segmentation, one = model(), batch([0, 1], [(32, 32), (24, 32)])
    assert segmentation.on_before_batch_transfer(one, 0) is one
    one["mask"][1, 3, 4:6] = 7
    with pytest.raises(ValueError, match="0 to 2, or 255 to ignore; got 7 at 2 pixels of 001"):
        segmentation.on_before_batch_transfer(one, 0)
    one["mask"][1, 3, 4:6] = 0
    one["whole_mask"] = [torch.zeros(4, 4, dtype=torch.uint8), torch.full((4, 4), 3, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="got 3 at 16 pixels of 001"):
        segmentation.on_before_batch_transfer(one, 0)
    with pytest.raises(ValueError, match="a mask has the pixels of its image"):
        segmentation.on_before_batch_transfer({**one, "mask": one["mask"][:, 1:]}, 0)
    with pytest.raises(ValueError, match="a class map with each image; NoneType gives image, label"):
        segmentation.on_before_batch_transfer({"image": one["image"], "label": torch.zeros(2)}, 0)
