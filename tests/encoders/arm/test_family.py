"""Checkpoints of ARM encoders: published ones, our own, and one direction becoming four."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ssmpretrain
from ssmpretrain.encoders.arm.arm import VARIANTS, ARMEncoder
from ssmpretrain.encoders.arm.family import FAMILY, four_directions
from ssmpretrain.encoders.sequence.pos_embed import resize_grid

FORWARD = (
    "conv1d{}.weight",
    "conv1d{}.bias",
    "x_proj{}.weight",
    "dt_proj{}.weight",
    "dt_proj{}.bias",
    "A{}_log",
    "D{}",
)


def encoder(**options) -> ARMEncoder:
    """A small encoder in which no two directions and no two channels are alike."""
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder("test_arm", **{"num_classes": 0, "img_size": 64, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published_pretraining(model: ARMEncoder) -> dict[str, Tensor]:
    """A one-direction encoder and what else a file of the published pretraining code holds."""
    state = {name.replace("norm_f.", "norm_4."): tensor for name, tensor in model.state_dict().items()}
    others = ("ar_token", "dec_pos_embed", "mask", "norm_1.weight", "enc2dec.weight", "dec_block.0.attn2.q.weight")
    return state | {name: torch.zeros(3) for name in others}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def save(tmp_path):
    def save(content, name: str = "weights.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def run(save):
    """The checkpoint of a pretraining run of `encoder(directions=1)`."""
    state = {f"encoder.{name}": tensor for name, tensor in encoder(directions=1).state_dict().items()}
    encoder_entry = {"name": "test_arm", "args": {"img_size": 64}}
    return save({"state_dict": state | {"query_token": torch.zeros(1)}, "encoder": encoder_entry}, "last.ckpt")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("directions", [1, 4])
def test_every_variant_is_recognised_from_its_shapes(name, directions):
    with torch.device("meta"):
        state = ssmpretrain.create_encoder(name, directions=directions).state_dict()
    found = FAMILY.recognise(state)
    assert FAMILY.variant_name(found) == name and found["img_size"] == 224


def test_a_fine_tuned_file_comes_back_as_it_is(save):
    model = encoder(num_classes=7)
    loaded = ssmpretrain.load_encoder(save({"model": model.state_dict()}))
    assert same(loaded, model)
    assert (loaded.load_report.fresh, loaded.load_report.copied) == ((), ())
    assert "copied" not in str(loaded.load_report)


def test_a_pretrained_file_gives_every_direction_the_forward_weights_bit_for_bit(save):
    pretrained = encoder(directions=1)
    loaded = ssmpretrain.load_encoder(save({"model": published_pretraining(pretrained), "epoch": 1599}))
    assert loaded.directions == 4
    old, new = pretrained.state_dict(), loaded.state_dict()
    copies = set()
    for layer in range(4):
        for name in FORWARD:
            key = f"layers.{layer}.mixer.{name}"
            for suffix in ("", "_b", "_c", "_c_b"):
                assert torch.equal(new[key.format(suffix)], old[key.format("")])
            copies |= {key.format(suffix) for suffix in ("_b", "_c", "_c_b")}
    assert set(loaded.load_report.copied) == copies
    assert set(new) - set(old) == copies | {"cls_token"}
    rest = [key for key in old if key != "pos_embed"]
    assert all(torch.equal(new[key], old[key]) for key in rest)  # the rest, the final norm among them
    assert torch.equal(
        new["pos_embed"], torch.cat([old["pos_embed"][:, :8], torch.zeros(1, 1, 32), old["pos_embed"][:, 8:]], 1)
    )
    assert loaded.pos_embed.requires_grad


def test_copies_are_trained_apart(run):
    mixer = ssmpretrain.load_encoder(run).layers[0].mixer
    with torch.no_grad():
        mixer.conv1d_c.weight.zero_()
    assert mixer.conv1d.weight.any() and mixer.conv1d_b.weight.any()


def test_the_report_names_the_copies_and_the_fresh_class_token(run):
    report = ssmpretrain.load_encoder(run, num_classes=3).load_report
    assert report.fresh == ("cls_token", "head.weight", "head.bias")
    assert len(report.copied) == 84 and report.loaded == report.total - 3
    assert f"{report.loaded} of {report.total} tensors loaded, 84 of them copied from the forward direction" in str(
        report
    )


@torch.no_grad()
def test_our_run_loads_with_four_directions_or_as_it_was_pretrained(run):
    assert ssmpretrain.load_encoder(run).directions == 4
    again = ssmpretrain.load_encoder(run, directions=1)
    assert same(again, encoder(directions=1)) and again.load_report.fresh == ()
    assert not again.pos_embed.requires_grad
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(images), encoder(directions=1).eval()(images))


def test_an_encoder_that_was_built_with_one_direction_stays_so(save):
    model = encoder(directions=1, num_classes=3)
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    args = {"img_size": 64, "directions": 1}
    loaded = ssmpretrain.load_encoder(save({"state_dict": state, "encoder": {"name": "test_arm", "args": args}}))
    assert same(loaded, model)


@torch.no_grad()
def test_another_image_size_resizes_the_patches_positions_alone(run):
    model = ssmpretrain.load_encoder(run, img_size=96)
    assert model.load_report.resized == ("pos_embed",)
    rows = torch.cat([model.pos_embed[:, :18], model.pos_embed[:, 19:]], dim=1)
    assert torch.equal(rows, resize_grid(encoder(directions=1).pos_embed, (4, 4), (6, 6)))
    assert not model.pos_embed[:, 18].any()


def test_four_directions_are_not_cut_down_to_one(save):
    with pytest.raises(ValueError, match=r"directions=1 reads an ARM encoder as pretrained.*got a file with four"):
        ssmpretrain.load_encoder(save({"model": encoder().state_dict()}), directions=1, img_size=64)


def test_a_file_that_lacks_some_directions_is_refused_and_not_completed(save):
    state = {name: tensor for name, tensor in encoder().state_dict().items() if "_b." not in name}
    with pytest.raises(ValueError, match=r"missing: layers.0.mixer.conv1d_b.weight"):
        ssmpretrain.load_encoder(save({"model": state}))


def test_a_class_token_that_was_lost_is_not_made_up(save):
    state = encoder().state_dict()
    del state["cls_token"]
    with pytest.raises(ValueError, match="1 missing: cls_token"):
        ssmpretrain.load_encoder(save(state), "test_arm", img_size=64)


def test_an_arm_file_is_no_vim(save):
    with pytest.raises(ValueError, match=r"layers.0.mlp.w1.weight means a gated MLP in every block, an ARM encoder"):
        ssmpretrain.load_encoder(save(encoder().state_dict()), "test_vim")


def test_a_file_that_lost_its_last_blocks_is_refused(save):
    state = {name: tensor for name, tensor in encoder().state_dict().items() if not name.startswith("layers.3.")}
    with pytest.raises(ValueError, match=r"holds 3 blocks of 32 channels; test_arm has 4.*pass depth=3"):
        ssmpretrain.load_encoder(save(state))


def test_copying_leaves_its_input_alone():
    state = encoder(directions=1).state_dict()
    names = set(state)
    copied, names_of_copies = four_directions(state)
    assert set(state) == names and set(copied) == names | set(names_of_copies)
