"""MAE and CLIP in one run: the loss is the sum of both losses, with one encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import TRAINING, VIM, Pairs, apart, fit, tiny

import ssmpretrain
from ssmpretrain.objectives import CLIP, MAE, MAECLIP

DECODER: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 1}
ROUNDING = 2e-6  # float32: sums over eight pairs in another order, 6e-8 a rounding


def tiny_both(**changes: Any) -> MAECLIP:
    model: MAECLIP = tiny(MAECLIP, **{**DECODER, **changes})
    return model


def filled(model: Any, other: Any) -> Any:
    """A model with the weights that `other` has by the same names."""
    theirs = other.state_dict()
    model.load_state_dict({name: theirs[name] for name in model.state_dict()})
    return model


def one_step(model: Any, batches: int) -> dict[str, torch.Tensor]:
    """Gradients of one step of eight pairs, with the masks of a seed."""
    torch.manual_seed(7)
    return fit(model, Pairs(8 // batches, steps=1), accumulate_grad_batches=batches).steps[0]


@pytest.mark.parametrize("batches", [1, 4])
def test_the_gradient_is_the_weighted_sum_of_clips_for_all_pairs_and_maes_mean_over_the_batches(batches: int) -> None:
    both = tiny_both(clip_weight=0.5, mae_weight=2.0)
    clip, mae = filled(tiny(CLIP), both), filled(MAE("test_vim", VIM, **DECODER, **TRAINING), both)
    step, of_clip, of_mae = one_step(both, batches), one_step(clip, 1), one_step(mae, batches)
    none = torch.zeros(())
    summed = {name: 0.5 * of_clip.get(name, none) + 2.0 * of_mae.get(name, none) for name in step}
    assert apart(step, summed) < ROUNDING
    logged, losses = (
        both.trainer.callback_metrics,
        [float(one.trainer.callback_metrics["train/loss"]) for one in (clip, mae)],
    )
    assert [float(logged["train/clip_loss"]), float(logged["train/mae_loss"])] == pytest.approx(losses, rel=ROUNDING)
    assert float(logged["train/loss"]) == pytest.approx(0.5 * losses[0] + 2.0 * losses[1], rel=ROUNDING)


def test_every_parameter_gets_a_gradient_also_the_norm_of_what_is_pooled() -> None:
    model = tiny_both(encoder="test_vit", encoder_args={"img_size": 32, "patch_size": 8, "global_pool": "avg"})
    step = one_step(model, 1)
    assert "encoder.fc_norm.weight" in step
    assert step.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_validation_repeats_and_logs_both_losses() -> None:
    model = tiny_both()
    fit(model, Pairs(8, steps=1), limit_val_batches=1)
    first = dict(model.trainer.callback_metrics)
    model.trainer.validate(model, Pairs(8), verbose=False)
    again = model.trainer.callback_metrics
    assert all(again[name] == first[name] for name in ("val/loss", "val/clip_loss", "val/mae_loss"))
    assert again["val/loss"] == pytest.approx(float(again["val/clip_loss"] + again["val/mae_loss"]))


def test_pictures_encoder_and_objective_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_both(loss="siglip", clip_weight=2.0)
    fit(model, Pairs(8, steps=1))
    model.trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ssmpretrain.load_encoder(tmp_path / "run.ckpt")
    assert apart(loaded.state_dict(), model.encoder.state_dict()) == 0
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["objective"] == "MAECLIP" and saved["hyper_parameters"]["clip_weight"] == 2.0
    images = torch.randn(2, 3, 32, 32)
    pictures = model.pictures(images, model.reconstruct(images), (0.5,) * 3, (0.5,) * 3)
    assert set(pictures) > {"image", "prediction"}


def test_it_begins_with_the_encoder_of_a_mae_run_and_its_positions_learn(tmp_path: Path) -> None:
    first = tiny_both()
    fit(first, Pairs(8, steps=1))
    first.trainer.save_checkpoint(tmp_path / "run.ckpt")
    for begun in (tiny_both, lambda **source: MAE(**source, **DECODER)):
        second: Any = begun(encoder=None, encoder_args={}, init_from=str(tmp_path / "run.ckpt"))
        report = second.encoder.load_report
        assert report.loaded == report.total and apart(second.encoder.state_dict(), first.encoder.state_dict()) == 0
        assert second.encoder.pos_embed.requires_grad and not first.encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_weight": 0.0}, "MAECLIP: clip_weight is a number above 0; got 0.0. For one loss use CLIP"),
        ({"mae_weight": -1.0}, "MAECLIP: mae_weight is a number above 0"),
        ({"mae_weight": float("inf")}, "MAECLIP: mae_weight is a number above 0; got inf"),
        ({"encoder": "test_convnext", "encoder_args": {}}, "MAECLIP: the encoder runs on the visible patches alone"),
        ({"loss": "softmax"}, "MAECLIP: loss is clip or siglip"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_both(**changes)
