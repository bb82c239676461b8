"""CLIP's image tower: sources of its weights, locking, and training on some patches of each image."""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_run import fit_one_step, tiny_clip
from lightning.pytorch import Trainer
from pairs import TEXT, VIM, Pairs, apart, fit, tiny

import ssmpretrain
from ssmpretrain.callbacks import EMA
from ssmpretrain.objectives import ARM, CLIP, MAE, SimMIM
from ssmpretrain.objectives.restore import load_contrastive

DECODER: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 1}


def saved(model: Any, path: Path) -> Path:
    """A checkpoint of a model, as a run writes it."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Where the encoder comes from


@pytest.mark.parametrize(
    "source",
    [
        lambda: MAE("test_vim", VIM, **DECODER),
        lambda: MAE("test_vmamba", **DECODER),
        lambda: SimMIM("test_vmamba"),
        lambda: ARM("test_arm", {"patch_size": 8}, cluster_size=4, decoder_num_heads=4, **DECODER),
    ],
    ids=["MAE of Vim", "MAE of VMamba", "SimMIM", "ARM"],
)
def test_the_encoder_of_another_run_is_taken_over_whole(source: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    run = source()
    with torch.no_grad():
        for parameter in run.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)
    model = tiny(CLIP, encoder=None, encoder_args={}, init_from=str(saved(run, tmp_path / "run.ckpt")))
    report = model.encoder.load_report
    assert report.loaded == report.total - len(report.fresh) and set(report.fresh) <= {"cls_token"}
    assert model.encoder_name == run.encoder_name
    ours, theirs = model.encoder.state_dict(), run.encoder.state_dict()
    # ARM is pretrained in one direction and without a class token: neither is its position there.
    taken = ours.keys() - {*report.fresh, *report.copied, *(["pos_embed"] if report.fresh else [])}
    assert all(torch.equal(ours[name], theirs[name]) for name in taken) and len(taken) > len(theirs) / 3
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


def test_a_tensor_that_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    path = saved(MAE("test_vim", VIM, **DECODER), tmp_path / "run.ckpt")
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["encoder.norm_f.weight"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"norm_f\.weight"):
        tiny(CLIP, encoder=None, encoder_args={}, init_from=str(path))


def test_a_clip_run_gives_its_encoder_to_the_next(tmp_path: Path) -> None:
    first = tiny(CLIP, mask_ratio=0.5)
    fit(first, Pairs(8))
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = tiny(CLIP, encoder=None, encoder_args={}, init_from=str(tmp_path / "first.ckpt"))  # unmasked tuning
    loaded = ssmpretrain.load_encoder(tmp_path / "first.ckpt")
    for encoder in (second.encoder, loaded):
        assert apart(encoder.state_dict(), first.encoder.state_dict()) == 0


# Locked


LOCKED_TEXT = replace(TEXT, locked=True)


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("encoder", {"encoder_args": {**VIM, "drop_path_rate": 0.5}, "lock_image": True}),
        ("encoder", {"encoder": "test_resnet", "encoder_args": {}, "lock_image": True}),
        ("text", {"text": LOCKED_TEXT}),
    ],
)
def test_a_locked_tower_stays_as_it_is_in_evaluation_mode_while_the_rest_trains(
    tower: str, changes: dict[str, Any]
) -> None:
    model, modes = tiny(CLIP, **changes).train(), []
    before, within = weights(model), f"{tower}."
    model.get_submodule(tower).register_forward_pre_hook(
        lambda module, _: modes.append((module.training, torch.is_grad_enabled()))
    )
    record = fit(model, Pairs(8), EMA(0.5), limit_val_batches=1)
    after = model.state_dict()
    trained = {name for name, value in before.items() if not torch.equal(value, after[name])}
    learning = {name for name, _ in model.named_parameters() if not name.startswith(within)}
    assert record.steps[0].keys() == learning and not any(name.startswith(within) for name in trained)
    assert learning <= trained and modes == [(False, False)] * 5  # three steps, and a validation of both weights
    groups = model.trainer.optimizers[0].param_groups
    assert {name for group in groups for name in group["param_names"]} == learning


def test_a_locked_encoder_runs_once_an_image_also_where_batches_accumulate() -> None:
    model, seen = tiny(CLIP, lock_image=True), []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    fit(model, Pairs(2, steps=1), accumulate_grad_batches=4)
    assert seen == [2] * 4


def test_a_locked_encoder_with_fresh_weights_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(MAE("test_vim", VIM, **DECODER), tmp_path / "run.ckpt")
    source = {"encoder": None, "encoder_args": {}, "init_from": str(run)}
    for changes, warned in ((source, False), ({"encoder_args": VIM}, True)):
        caplog.clear()
        fit(tiny(CLIP, lock_image=True, **changes), Pairs(8, steps=1))
        assert ("comes with fresh weights" in caplog.text) == warned


def test_two_locked_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="one of the towers trains; got both locked"):
        tiny(CLIP, lock_image=True, text=LOCKED_TEXT)


# Some patches


@pytest.mark.parametrize(("encoder", "size", "visible"), [("test_vim", 32, 8 + 1), ("test_vit", 64, 8 + 1)])
def test_training_sees_half_of_the_patches_and_evaluation_all(encoder: str, size: int, visible: int) -> None:
    args = VIM if encoder == "test_vim" else {"img_size": size}
    model, lengths = tiny(CLIP, encoder=encoder, encoder_args=args, mask_ratio=0.5), []
    first = model.encoder.layers[0] if encoder == "test_vim" else model.encoder.blocks[0]
    first.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    fit(model, Pairs(8, steps=1, size=size), limit_val_batches=1)
    assert lengths == [visible, 16 + 1]


def test_masks_are_drawn_anew_for_every_batch() -> None:
    model, images = tiny(CLIP, mask_ratio=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.encode_for_training(images), model.encode_for_training(images))
    assert torch.equal(model.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, r"CLIP: mask_ratio is a fraction in \[0, 1\); got 1.0"),
        (
            {"mask_ratio": 0.5, "encoder": "test_convnext", "encoder_args": {}},
            "'test_convnext' cannot.*mask_ratio to 0",
        ),
        ({"mask_ratio": 0.5, "encoder_args": {"stride": 8}}, "CLIP: test_vim: patches must not overlap"),
        ({"encoder": None}, "by its name or from a checkpoint; got neither"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(CLIP, **changes)


def test_images_that_are_no_grid_of_patches_are_refused_before_training_with_masks() -> None:
    with pytest.raises(ValueError, match=r"CLIP: images are grids of two or more squares of 8 x 8 .*got 36 x 36"):
        fit(tiny(CLIP, mask_ratio=0.5), Pairs(8, size=36))


# All of a run


def test_both_towers_of_a_run_and_what_joins_them_are_taken_over(tmp_path: Path) -> None:
    source = fit_one_step(tmp_path, tiny_clip(loss="siglip"))
    begun = tiny_clip(encoder=None, encoder_args=None, init_from=str(source), init_both_towers=True, loss="siglip")
    saved = torch.load(source / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert begun.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in begun.state_dict().items())

    of_clip = tiny_clip(encoder=None, encoder_args=None, init_from=str(source), init_both_towers=True)
    assert torch.equal(of_clip.image_projection.weight, saved["image_projection.weight"])
    assert float(of_clip.logit_scale) == pytest.approx(math.log(1 / 0.07))  # another loss has another temperature


def test_a_run_begun_with_both_towers_comes_back_without_its_source(tmp_path: Path) -> None:
    source = fit_one_step(tmp_path / "one", tiny_clip())
    begun = tiny_clip(encoder=None, encoder_args=None, init_from=str(source), init_both_towers=True)
    run = fit_one_step(tmp_path / "two", begun)
    shutil.rmtree(source)
    model = load_contrastive(run).model
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 8}, "Set model.embed_dim=24"),
        ({"text": {"init_from": "elsewhere"}}, "got text.init_from elsewhere too. Name one run there"),
        ({"init_from": None, "encoder": "test_vim"}, "got no init_from. Name one run there"),
    ],
)
def test_both_towers_come_from_one_run_of_the_same_size(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = fit_one_step(tmp_path, tiny_clip())
    settings = {"encoder": None, "encoder_args": None, "init_from": str(source), "init_both_towers": True, **changes}
    with pytest.raises(ValueError, match=message):
        tiny_clip(**settings)


# What a step is given


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3, 32, 32), ["a", "b"]), "a batch is a dictionary of images .* are of type tuple"),
        ({"image": torch.zeros(2, 3, 32, 32), "label": torch.zeros(2)}, "have image, label. Use .*ImageTextShards"),
    ],
)
def test_batches_without_captions_are_refused_by_what_they_have(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(CLIP).on_before_batch_transfer(batch, 0)


def test_an_image_without_its_one_caption_stops_the_run() -> None:
    class Uneven(Pairs):
        def _batch(self, images: torch.Tensor, texts: list[str]) -> dict[str, Any]:
            return super()._batch(images, [*texts, "one more"])

    with pytest.raises(ValueError, match="every image has one caption; got 4 images and 5 captions"):
        fit(tiny(CLIP), Uneven(4))


def test_a_batch_of_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two pairs or more, to contrast them; got a batch of 1 \("):
        fit(tiny(CLIP), Pairs(1, 1))


def test_captions_that_were_cut_are_counted_in_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ssmpretrain"):
        fit(tiny(CLIP, text=replace(TEXT, context_length=4)), Pairs(4))
    assert "epoch 1: 24 of 24 captions had more than 4 tokens and were cut" in caplog.text


def test_a_locked_text_tower_with_fresh_weights_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ssmpretrain"):
        fit(tiny(CLIP, text=replace(TEXT, locked=True)), Pairs(4))
    assert "CLIP: text.locked keeps the text tower as it comes, and it comes with fresh weights" in caplog.text
