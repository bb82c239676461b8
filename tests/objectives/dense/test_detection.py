"""Detection: training on every encoder, validation at the sizes of the files, ranks, resume, and wrong data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import in_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from rectangles import NAMES, Rectangles, batch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.callbacks import EMA
from ssmpretrain.datamodules import Shapes
from ssmpretrain.encoders import load_encoder
from ssmpretrain.encoders.features.taps import Taps
from ssmpretrain.objectives import Detection
from ssmpretrain.objectives.dense.detectors import BoxHead, Detector, MaskHead, Neck, Proposals
from ssmpretrain.objectives.restore import restore
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine


def detector(name: str = "mask_rcnn", **settings: Any) -> Detector:
    small = {"samples": 32, "box_head": BoxHead(width=32), "mask_head": MaskHead(1, 16)}
    return Detector(name=name, **{**small, **settings})  # type: ignore[arg-type]


def detection(encoder: str = "test_vmamba", name: str = "mask_rcnn", **arguments: Any) -> Detection:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "detector": detector(name), "neck": Neck(width=64 if name == "fcos" else 32)}
    return Detection(encoder, **{**settings, **arguments})


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(**{**defaults, **quiet, "max_epochs": 1, "num_sanity_val_steps": 0, **settings})


def validated(folder: Path, model: Detection, *batches: dict[str, Any]) -> dict[str, float]:
    (metrics,) = trainer(folder).validate(model, datamodule=Rectangles([], list(batches)), verbose=False)
    return dict(metrics)


# Ranks first, because threads of a backward pass do not survive a fork


def canned(key: str) -> dict[str, Tensor]:
    """Detections of an image that are right for even numbers and shifted for odd ones."""
    number = int(key.split("-")[1])
    objects = batch([number], [1 + number % 2])["objects"][0]
    n = len(objects["classes"])
    shift = 20.0 * (number % 2)
    return {
        "boxes": objects["boxes"] + shift,
        "scores": torch.full((n,), 1 / (number + 1)),
        "classes": objects["classes"],
    }


def scores_of_rank(numbers: list[list[int]]) -> dict[str, float]:
    with ranks.joined_ranks():
        model = detection(name="faster_rcnn")
        logged: dict[str, float] = {}
        vars(model)["log"] = lambda name, value, **options: logged.update({name: value})
        model._trainer = trainer(Path("nowhere"))
        mine = numbers[ranks.rank()]
        one = batch(mine, [1 + number % 2 for number in mine])
        vars(model)["detect"] = lambda images, sizes: [canned(key) for key in one["key"]]
        model.on_validation_epoch_start()
        model.validation_step(one, 0)
        model._trainer.sanity_checking = False
        type(model._trainer).is_global_zero = property(lambda self: False)  # type: ignore[assignment]
        model.on_validation_epoch_end()
        return logged


def test_two_ranks_with_four_and_three_images_have_the_scores_of_one() -> None:
    one, two = in_ranks(2, scores_of_rank, [[0, 1, 2, 3], [4, 5, 6]])
    (alone,) = in_ranks(1, scores_of_rank, [[0, 1, 2, 3, 4, 5, 6]])
    assert one == two == alone and 0.1 < alone["val/box_AP"] < 0.9
    padded = in_ranks(2, scores_of_rank, [[0, 1, 2, 3], [4, 5, 6, 0]])[0]  # a sampler that repeats an image
    assert padded == alone


# Training


FAMILIES = ["test_vim", "test_vmamba", "test_vmamba2", "test_vit", "test_mambaout", "test_arm"]
PUBLISHED = ["mambaout_femto", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
KINDS = ["mask_rcnn", "cascade_mask_rcnn", "retinanet", "fcos"]
CASES = [(encoder, "mask_rcnn") for encoder in FAMILIES] + [("test_vim", kind) for kind in KINDS[1:]]
SLOW = [(encoder, kind) for encoder in FAMILIES[1:] for kind in KINDS[1:]]
SLOW += [(encoder, kind) for encoder in PUBLISHED for kind in ("mask_rcnn", "retinanet")]


@pytest.mark.parametrize(("encoder", "kind"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_encoder_trains_every_parameter_on_images_with_and_without_objects(encoder: str, kind: str) -> None:
    model = detection(encoder, kind).train()
    for counts in ([1, 1], [1, 0], [0, 0]):
        model.zero_grad()
        losses = model.losses(batch([1, 2], counts, H=60, W=100))  # no multiple of any stride
        torch.autograd.backward(list(losses.values()))
        assert all(loss.isfinite() for loss in losses.values())
        unused = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        assert unused == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "match"),
    [*(("mask_rcnn", match) for match in ("torchvision", "mmdet", "detectron2")), ("cascade_mask_rcnn", "detectron2")],
)
def test_four_images_are_learned_by_heart(kind: str, match: str, tmp_path: Path) -> None:
    images = [batch([0, 1], [1, 1], 2), batch([2, 3], [1, 2], 2)]
    settings = detector(kind, proposals=Proposals(anchor_scale=6), box_head=BoxHead(width=64))
    model = detection(
        detector=settings, match=match, optimizer=AdamW(lr_per_256=0.3, weight_decay=0.0), schedule=Cosine(0.2)
    )
    trainer(tmp_path, max_epochs=5, limit_val_batches=0).fit(model, Rectangles(images * 15))
    metrics = validated(tmp_path, model, *images)
    assert metrics["val/box_AP50"] > 0.95 and metrics["val/mask_AP50"] > 0.95 and metrics["val/box_AP"] > 0.7


def test_a_step_lowers_the_loss_on_a_fixed_batch() -> None:
    model, one = detection(name="retinanet").train(), batch([0, 1], [1, 2])  # draws no samples
    optimizer = AdamW(lr_per_256=1e-3).build(model, 256)
    before = torch.stack(list(model.losses(one).values())).sum()
    torch.autograd.backward(before)
    optimizer.step()
    assert torch.stack(list(model.losses(one).values())).sum() < before


def test_bf16_trains_to_finite_parameters_and_logs_the_parts_of_the_loss(tmp_path: Path) -> None:
    model = detection("test_vim", "cascade_mask_rcnn", encoder_args={"drop_path_rate": 0.1}, layer_decay=0.8)
    run = trainer(tmp_path, precision="bf16-mixed", callbacks=[EMA(0.5)])
    run.fit(model, Rectangles([batch([0, 1], [2, 0])], [batch([2, 3], [1, 0])]))
    parts = [float(value) for name, value in run.callback_metrics.items() if name.startswith("train/loss_")]
    assert len(parts) == 9 and math.isclose(sum(parts), run.callback_metrics["train/loss"], rel_tol=1e-5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (tmp_path / "detection.json").exists()


def test_a_frozen_encoder_keeps_its_weights_and_its_mode(tmp_path: Path) -> None:
    model = detection(freeze_encoder=True)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    trainer(tmp_path, limit_val_batches=0).fit(model, Rectangles([batch([0, 1], [1, 1])]))
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert not model.encoder.training and model.detector.training


class Killed(Exception):
    """Stand-in for SIGKILL: no code saves or cleans up after it."""


class DieAfter(Callback):
    """Save a checkpoint and die after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        raise Killed


def test_a_run_that_continues_equals_one_that_was_never_stopped_to_the_last_bit(tmp_path: Path) -> None:
    def trained(callbacks: list[Any], path: str | None = None) -> dict[str, Tensor]:
        model = detection("test_vim", "mask_rcnn", encoder_args={"drop_path_rate": 0.5})
        data = Rectangles([batch([0, 1], [1, 2]), batch([2, 3], [0, 1])], [batch([4], [1])])
        run = trainer(tmp_path, max_epochs=2, callbacks=callbacks)
        run.fit(model, data, ckpt_path=path, weights_only=True)
        return model.state_dict()

    whole = trained([])
    with pytest.raises(Killed):
        trained([DieAfter(tmp_path / "stopped.ckpt")])
    torch.rand(3)
    parts = trained([], str(tmp_path / "stopped.ckpt"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_checkpoint_gives_back_the_detector_and_its_encoder(tmp_path: Path) -> None:
    settings = detector("cascade_mask_rcnn", mask_head=MaskHead(1, 16, heads=3), proposals=Proposals(convs=2))
    model = detection(detector=settings, match="mmdet", taps=Taps(norm="none"))
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(model, Rectangles([batch([0, 1], [1, 1])]))
    run.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["classes"] == NAMES
    restored = restore(content, tmp_path / "last.ckpt", Detection)
    assert restored is not None
    images = batch([5], [1])["image"]
    for mine, theirs in zip(model.eval()(images), restored.model(images), strict=True):
        assert {name: value.tolist() for name, value in mine.items()} == {n: v.tolist() for n, v in theirs.items()}
    assert type(load_encoder(tmp_path / "last.ckpt")) is type(model.encoder)


# Validation


@pytest.fixture
def all_right(monkeypatch: pytest.MonkeyPatch) -> Detection:
    """A model that finds every object of a batch, with a full mask in each box."""
    model = detection()
    known: list[dict[str, Tensor]] = []
    step = model.validation_step

    def detect(images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        return [
            {
                "boxes": one["boxes"],
                "classes": one["classes"],
                "scores": torch.ones(len(one["boxes"])),
                "masks": torch.ones(len(one["boxes"]), 28, 28),
            }
            for one in known
        ]

    def remember(one: dict[str, Any], batch_idx: int) -> None:
        known[:] = one["objects"]
        step(one, batch_idx)

    monkeypatch.setattr(model, "detect", detect)
    monkeypatch.setattr(model, "validation_step", remember)
    return model


@pytest.mark.parametrize("scale", [1, 3])
def test_boxes_and_masks_are_compared_at_the_size_of_the_file(all_right: Detection, scale: int, tmp_path: Path) -> None:
    images = [batch([0, 1], [1, 1], scale), batch([2], [0], scale)]
    for objects in images[0]["objects"]:
        del objects["masks"]  # in evaluation the annotations have them
    metrics = validated(tmp_path, all_right, *images)
    assert metrics["val/box_AP"] == pytest.approx(1.0)
    assert metrics["val/mask_AP"] > 0.85  # a pasted mask is rounded to whole pixels
    content = json.loads((tmp_path / "detection.json").read_text())
    assert content["num_images"] == 3 and content["match"] == "torchvision" and content["box"]["ap"] > 0.999
    of_classes = content["box"]["per_class"]
    assert list(of_classes) == NAMES and None in of_classes.values()  # two objects cannot have three classes


def test_a_validation_prints_the_classes(
    all_right: Detection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated(tmp_path, all_right, batch([0, 1], [1, 1]))
    lines = capsys.readouterr().out.splitlines()
    assert "box AP" in lines[0] and "mask AP" in lines[0] and {line.split()[0] for line in lines[1:4]} == set(NAMES)
    assert any(line.startswith("box AP 100.00 %, box AP50 100.00 %") for line in lines)


def test_an_untrained_model_that_finds_nothing_has_scores_of_zero(tmp_path: Path) -> None:
    model = detection(detector=detector(score_threshold=0.99))
    metrics = validated(tmp_path, model, batch([0, 1], [1, 2]))
    assert metrics["val/box_AP"] == metrics["val/mask_AP"] == metrics["val/box_AR100"] == 0


def test_data_without_any_object_log_no_score(tmp_path: Path) -> None:
    assert validated(tmp_path, detection(), batch([0, 1], [0, 0])) == {}


def test_boxes_stay_inside_the_image_without_its_padding() -> None:
    model, one = detection(detector=detector(score_threshold=0.0)).eval(), batch([0, 1], [1, 1])
    found = model.detect(one["image"], torch.tensor([[64, 96], [40, 50]]))
    assert len(found[1]["boxes"]) and found[1]["boxes"].amax(0).tolist()[2:] <= [50.0, 40.0]
    assert found[0]["masks"].shape[1:] == (28, 28) and (found[0]["scores"].diff() <= 0).all()


def test_detections_do_not_depend_on_the_batch_but_on_the_padding_that_was_asked_for() -> None:
    model, one = detection(detector=detector(score_threshold=0.0)).eval(), batch([0, 1], [1, 1])
    image = one["image"][1:, :, :40, :50]
    beside = model.detect(one["image"], torch.tensor([[64, 96], [40, 50]]))[1]
    alone = model(image)[0]
    assert all(torch.equal(beside[name], alone[name]) for name in alone)
    padded = detection(detector=detector(score_threshold=0.0), eval_pad_to=(128, 128)).eval()
    padded.load_state_dict(model.state_dict())
    assert not torch.equal(padded(image)[0]["scores"][:5], alone["scores"][:5])


# Wrong data and settings


def fails(tmp_path: Path, model: Detection, one: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        trainer(tmp_path, **settings).fit(model, Rectangles([one], [one]))
    return str(error.value)


def test_a_class_that_the_detector_does_not_have_names_the_image(tmp_path: Path) -> None:
    one = batch([0, 7], [1, 1])
    one["objects"][1]["classes"][0] = 3
    assert "classes of objects are from 0 to 2; got 3 in scene-7" in fails(tmp_path, detection(), one)
    one["objects"][1]["classes"][0] = 0
    one["annotation"][0]["objects"][0]["category"] = -1
    assert "got -1 in scene-0" in fails(tmp_path, detection(), one)


def test_data_without_masks_are_refused_by_the_first_batch_of_a_detector_of_masks(tmp_path: Path) -> None:
    one = batch([0, 1], [1, 1])
    for objects in one["objects"]:
        del objects["masks"]
    message = fails(tmp_path, detection(), one)
    assert "every object has one; scene-0 has objects without" in message and "faster_rcnn" in message
    model = detection(name="faster_rcnn")
    trainer(tmp_path, limit_val_batches=0).fit(model, Rectangles([one]))
    assert math.isfinite(model.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["objects"][0]["boxes"].fill_(math.nan), "finite numbers; got NaN or infinity in scene-0"),
        (lambda one: one["objects"][0].update(masks=torch.zeros(1, 8, 8)), r"64 x 96; got \(8, 8\) for scene-0"),
        (lambda one: one.pop("objects"), "these batches lack objects. Use a data module of detection"),
        (lambda one: one.pop("annotation"), "these batches lack annotation"),
    ],
)
def test_a_wrong_batch_is_one_message(change: Any, message: str, tmp_path: Path) -> None:
    one = batch([0, 1], [1, 1])
    change(one)
    with pytest.raises(DataError, match=message):
        trainer(tmp_path).fit(detection(), Rectangles([one], [one]))


def test_data_of_another_task_are_told_before_their_number_of_classes(tmp_path: Path) -> None:
    data = Shapes(train_images=8, val_images=8, image_size=32, batch_size=4, num_workers=0)
    for start in (trainer(tmp_path).fit, trainer(tmp_path).validate):
        with pytest.raises(DataError, match=r"these batches lack objects, size\. Use a data module of detection"):
            start(detection(), datamodule=data)


def test_a_missing_evaluator_is_named_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = detection(), batch([0], [1])

    def missing(name: str) -> None:
        raise ImportError("No module named 'pycocotools'")

    monkeypatch.setattr("ssmpretrain.evaluation.dense.masks.import_module", missing)
    assert "pip install" in fails(tmp_path, model, one) and model.trainer.global_step == 0


def test_settings_that_a_detector_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = detection(name="retinanet")
    trainer(tmp_path, limit_val_batches=0).fit(model, Rectangles([batch([0], [1])]))
    assert "does not use model.detector.samples, model.detector.box_head, model.detector.mask_head" in caplog.text
    assert detector("faster_rcnn").unused == ["mask_head"] and detector().unused == []


def test_a_box_without_a_side_does_not_train_and_its_image_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = batch([0, 7], [1, 1])
    one["objects"][1]["boxes"][0, 2] = one["objects"][1]["boxes"][0, 0]
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(detection(), Rectangles([one, one]))
    assert math.isfinite(run.callback_metrics["train/loss"])
    assert caplog.text.count("boxes without width or height do not train; the first is in scene-7") == 1


def test_the_number_of_classes_is_that_of_the_data(tmp_path: Path) -> None:
    message = fails(tmp_path, detection(num_classes=80), batch([0], [1]))
    assert "got 80 and 3 classes" in message and "Set model.num_classes to 3" in message


# Published sizes


@pytest.mark.parametrize(
    ("encoder", "millions"),
    [("vmamba_tiny_s1l8", 49.757), ("swin_tiny_patch4_window7_224", 47.796)],
)
def test_mask_rcnn_has_the_published_number_of_parameters(encoder: str, millions: float) -> None:
    with torch.device("meta"):
        model = Detection(encoder, num_classes=80, match="mmdet")
    parts = {name: sum(one.numel() for one in part.parameters()) for name, part in model.detector.named_children()}
    assert (parts["proposals"], parts["stages"], parts["masks"]) == (593_935, 14_306_705, 2_643_280)
    trained = sum(one.numel() for one in model.parameters()) / 1e6  # published: 50 M with VMamba-T, 48 M with Swin-T
    assert trained == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("encoder", ["test_vim", "test_vit"])
def test_sides_that_are_no_multiple_of_the_patch_train(encoder: str, tmp_path: Path) -> None:
    data = Rectangles([batch([0, 1], [1, 0], H=60, W=100)], [batch([2], [1], H=61, W=70)])
    data.image_size = (60, 100)
    model, run = detection(encoder, name="faster_rcnn"), trainer(tmp_path)
    run.fit(model, data)
    assert math.isfinite(run.callback_metrics["train/loss"]) and "val/box_AP" in run.callback_metrics
    assert tuple(model.encoder.patch_embed.img_size) == (64, 112)
