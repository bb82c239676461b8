import argparse
import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import ssmpretrain
from ssmpretrain.encoders.sequence.class_token import remove_class_tokens
from ssmpretrain.encoders.sequence.pos_embed import resize_grid
from ssmpretrain.encoders.vim.family import FAMILY
from ssmpretrain.encoders.vim.vim import VARIANTS, Vim
from ssmpretrain.encoders.weights.on_disk import sidecar, sidecar_text


def encoder(**options) -> Vim:
    torch.manual_seed(0)
    return ssmpretrain.create_encoder("test_vim", **{"num_classes": 5, "img_size": 64, **options})


@pytest.fixture
def save(tmp_path):
    def save(content, name: str = "weights.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# The published layout


@torch.no_grad()
def test_a_published_file_answers_as_published(save, goldens, formula):
    shapes = json.loads((goldens / "vim_tiny.json").read_text())
    state = {name: torch.from_numpy(formula.weight(name, tuple(shape))).float() for name, shape in shapes.items()}
    path = save({"model": state, "epoch": 299, "args": argparse.Namespace(lr=5e-4), "best": np.float64(76.1)})
    model = ssmpretrain.load_encoder(path).eval()
    assert (model.load_report.loaded, model.load_report.total) == (415, 415)
    golden = np.load(goldens / "vim_tiny.npz")["logits"]
    answer = model(formula.images()).numpy()
    assert np.linalg.norm(answer - golden) / np.linalg.norm(golden) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_from_its_shapes(name):
    with torch.device("meta"):
        state = ssmpretrain.create_encoder(name).state_dict()
    assert FAMILY.variant_name(FAMILY.recognise(state)) == name


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"model_ema": s, "epoch": 3}])
def test_the_three_published_wrappings_load(save, wrap):
    model = encoder()
    assert same(ssmpretrain.load_encoder(save(wrap(model.state_dict()))), model)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "encoder.", "backbone.", "timm_model.", "_orig_mod.", "module.encoder._orig_mod.", "model.backbone."],
)
def test_wrappers_prefixes_are_taken_off(save, prefix):
    model = encoder()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert same(ssmpretrain.load_encoder(save({"state_dict": state})), model)


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 8, "class_token": "double", "bidirectional": "ssm"},
        {"class_token": "none", "bidirectional": "none", "d_state": 3, "in_chans": 1},
        {"expand": 1.5, "d_conv": 3, "img_size": 224, "stride": 8},
        {"embed_dim": 24, "depth": 3, "num_classes": 0},
    ],
)
def test_every_option_that_leaves_a_trace_is_recognised(save, options):
    model = encoder(**options)
    loaded = ssmpretrain.load_encoder(save(model.state_dict()))
    assert same(loaded, model)
    assert loaded.patch_embed.grid_size == model.patch_embed.grid_size


@torch.no_grad()
@pytest.mark.parametrize("pos_embed", ["learned", "sincos"])
def test_options_that_leave_no_trace_can_be_said(save, pos_embed):
    model = encoder(class_token="head", bidirectional="layer", pos_embed=pos_embed).eval()
    loaded = ssmpretrain.load_encoder(save(model.state_dict()), class_token="head", bidirectional="layer").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_the_average_is_taken_when_asked_for(save):
    trained, averaged = encoder(), encoder(d_state=16)
    with torch.no_grad():
        averaged.head.bias.fill_(1)
    both = save({"model": trained.state_dict(), "model_ema": averaged.state_dict()})
    assert same(ssmpretrain.load_encoder(both), trained)
    assert same(ssmpretrain.load_encoder(both, ema=True), averaged)
    assert ssmpretrain.load_encoder(both, ema=True).load_report.source == "model_ema"
    with pytest.raises(ValueError, match="no averaged weights, only model"):
        ssmpretrain.load_encoder(save({"model": trained.state_dict()}), ema=True)


def test_a_checkpoint_of_timms_trainer_has_both_weights(save):
    trained, averaged = encoder(), encoder()
    with torch.no_grad():
        averaged.head.bias.fill_(1)
    path = save(
        {"epoch": 3, "arch": "vim", "state_dict": trained.state_dict(), "state_dict_ema": averaged.state_dict()}
    )
    assert same(ssmpretrain.load_encoder(path), trained)
    model = ssmpretrain.load_encoder(path, ema=True)
    assert same(model, averaged) and model.load_report.origin["weights"] == "ema"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "first"),
    [("test_vim", "patch_embed.proj"), ("test_arm", "patch_embed.proj"), ("test_vmamba", "patch_embed.0")],
)
def test_other_channels_are_adapted_as_timm_does(save, name, first):
    model = ssmpretrain.create_encoder(name, num_classes=0)
    path = save(model.state_dict())
    before = model.get_submodule(first).weight
    one = ssmpretrain.load_encoder(path, in_chans=1)
    torch.testing.assert_close(one.get_submodule(first).weight, before.sum(dim=1, keepdim=True))
    four = ssmpretrain.load_encoder(path, in_chans=4)
    torch.testing.assert_close(four.get_submodule(first).weight, before[:, [0, 1, 2, 0]] * 3 / 4)
    assert f"{first}.weight adapted from 3 to 4 channels" in four.load_report.notes
    assert four.pretrained_cfg["input_size"][0] == 4 and four(torch.zeros(1, 4, 224, 224)).isfinite().all()


# FastVim's Vim


@torch.no_grad()
def test_a_vim_of_fastvims_masked_pretraining_loads_with_its_positions_in_place(save):
    model = encoder(num_classes=0, scan_norm=True, pos_embed="sincos").eval()
    assert {"layers.0.mixer.layernorm.weight", "layers.0.mixer.layernorm.bias"} <= model.state_dict().keys()
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    table = state["backbone.pos_embed"]
    state["backbone.pos_embed"] = torch.cat([table[:, 8:9], table[:, :8], table[:, 9:]], dim=1)  # the class row first
    blocks = encoder(embed_dim=16, depth=2, scan_norm=True).state_dict()
    state |= {name.replace("layers", "backbone.decoder_blocks"): blocks[name] for name in blocks if "layers" in name}
    loaded = ssmpretrain.load_encoder(save({"state_dict": state})).eval()
    assert loaded.load_report.args["scan_norm"] and same(loaded, model)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), model(images))


def test_fastvims_own_encoder_is_refused_though_its_tensors_fit(save):
    model = encoder(scan_norm=True, class_token="none")
    path = save({"state_dict": model.state_dict()})
    with pytest.raises(ValueError, match=r"no class token mean a FastVim encoder, whose tokens are pooled .*'none'"):
        ssmpretrain.load_encoder(path)
    assert same(ssmpretrain.load_encoder(path, class_token="none"), model)
    with pytest.raises(ValueError, match=r"scan_norm=True; .* with scan_norm=False was asked for"):
        ssmpretrain.load_encoder(path, class_token="none", scan_norm=False)


# Our own checkpoints


def lightning(model: Vim, **more) -> dict:
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": state | {"decoder.mask_token": torch.zeros(1)}, "pytorch-lightning_version": "2.6", **more}


@torch.no_grad()
def test_our_checkpoint_says_how_its_encoder_was_built(save):
    args = {"img_size": (64, 32), "class_token": "head", "num_classes": 0}
    model = encoder(**args).eval()
    path = save(lightning(model, encoder={"name": "test_vim", "args": args}), "last.ckpt")
    loaded = ssmpretrain.load_encoder(path).eval()
    images = torch.randn(1, 3, 64, 32)
    assert torch.equal(loaded(images), model(images))
    assert loaded(images).shape == (1, 32)  # without a head, pooled features
    assert loaded.load_report.unexpected == ()
    larger = ssmpretrain.load_encoder(path, img_size=(96, 96))
    assert larger.load_report.resized == ("pos_embed",)
    assert larger.patch_embed.grid_size == (6, 6)


def test_a_file_is_compared_with_the_checksum_beside_it(save):
    model = encoder()
    path = save(model.state_dict(), "step-000000001.ckpt")
    link = path.with_name("last.ckpt")
    link.symlink_to(path.name)
    whole = path.read_bytes()
    sidecar(path).write_text(sidecar_text(path, len(whole), hashlib.sha256(whole).hexdigest()))
    assert same(ssmpretrain.load_encoder(link), model)
    middle = whole.index(model.head.weight.detach().numpy().tobytes())
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 3]) + whole[middle + 1 :])
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"last.ckpt is damaged \(its checksum differs from .* Take an earlier one"):
        ssmpretrain.load_encoder(link)
    sidecar(path).unlink()
    assert not same(ssmpretrain.load_encoder(link), model)  # nothing else tells


def test_an_averaged_run_holds_both(save):
    averaged, trained = encoder(), encoder()
    with torch.no_grad():
        averaged.head.bias.fill_(1)
    raw = {f"encoder.{name}": tensor for name, tensor in trained.state_dict().items()}
    path = save(lightning(averaged, current_model_state=raw), "last.ckpt")
    assert same(ssmpretrain.load_encoder(path), averaged)
    assert same(ssmpretrain.load_encoder(path, ema=True), averaged)
    assert same(ssmpretrain.load_encoder(path, ema=False), trained)


def test_a_safetensors_file_loads_with_and_without_metadata(tmp_path):
    model = encoder(class_token="head")
    path = tmp_path / "encoder.safetensors"
    metadata = {"encoder": json.dumps({"name": "test_vim", "args": {"class_token": "head", "img_size": 64}})}
    for given in (None, metadata):
        safetensors.torch.save_file(model.state_dict(), path, given)
        loaded = ssmpretrain.load_encoder(path)
        assert same(loaded, model)
        assert loaded.class_token == ("middle" if given is None else "head")


TIMMS = {
    "test_mambaout": {},
    "test_vit": {},
    "test_vit3": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4
    },
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "embed_dim": 12, "depth": 1},  # two heads
    "efficientvit_m0": {},  # a head of two layers
}  # fmt: skip


SLOW_TO_BUILD = ("efficientvit_m0",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_TO_BUILD else []) for name in TIMMS]
)
@pytest.mark.parametrize("in_file", [0, 10])
def test_timms_encoders_load_from_our_checkpoints_with_any_head(save, name, in_file):
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder(name, num_classes=in_file, **TIMMS[name])
    path = save(lightning(model, encoder={"name": name, "args": TIMMS[name]}))
    own = model.state_dict()
    headless = ssmpretrain.create_encoder(name, num_classes=0, **TIMMS[name]).state_dict().keys()
    for asked in (None, 0, 10, 7):
        loaded = ssmpretrain.load_encoder(path, num_classes=asked)
        state, report = loaded.state_dict(), loaded.load_report
        assert loaded.num_classes == (in_file if asked is None else asked)
        whole_head = asked in (None, in_file)
        kept = own.keys() if whole_head else headless
        assert all(torch.equal(state[key], own[key]) for key in kept)
        assert set(report.fresh) == (set() if whole_head else state.keys() - headless)
        assert set(report.unexpected) == (set() if whole_head else own.keys() - headless)


def test_a_run_that_began_with_timms_weights_does_not_fetch_them_again(save):
    model = ssmpretrain.create_encoder("test_vit", num_classes=0)
    args = {"pretrained": True, "checkpoint_path": "/nowhere.pth"}
    path = save(lightning(model, encoder={"name": "test_vit", "args": args}))
    assert same(ssmpretrain.load_encoder(path), model)


def test_a_run_is_named_by_its_folder(tmp_path):
    model = encoder()
    (tmp_path / "checkpoints").mkdir()
    torch.save(lightning(model), tmp_path / "checkpoints" / "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"names a file; got the folder .*It holds checkpoints/epoch=1\.ckpt\."):
        ssmpretrain.load_encoder(tmp_path)
    torch.save(lightning(model), tmp_path / "checkpoints" / "last.ckpt")
    loaded = ssmpretrain.load_encoder(tmp_path)
    assert same(loaded, model)
    assert loaded.load_report.path == tmp_path / "checkpoints" / "last.ckpt"


# Head, sizes, report


def test_the_head_is_kept_dropped_or_made_afresh(save):
    model = encoder()
    path = save(model.state_dict())
    assert ssmpretrain.load_encoder(path).num_classes == 5
    assert torch.equal(ssmpretrain.load_encoder(path, num_classes=5).head.weight, model.head.weight)
    dropped = ssmpretrain.load_encoder(path, num_classes=0)
    assert dropped(torch.randn(1, 3, 64, 64)).shape == (1, 32)
    fresh = ssmpretrain.load_encoder(path, num_classes=7)
    assert fresh.head.weight.shape == (7, 32)
    assert fresh.load_report.fresh == ("head.weight", "head.bias")


@pytest.mark.parametrize("num_classes", [None, 5])
def test_half_a_head_is_no_head(save, num_classes):
    state = encoder().state_dict()
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"1 missing: head\.bias\."):
        ssmpretrain.load_encoder(save(state), num_classes=num_classes)
    assert ssmpretrain.load_encoder(save(state), num_classes=7).load_report.fresh == ("head.weight", "head.bias")


def test_dtypes_are_the_encoders_or_the_files(save):
    model = encoder().bfloat16()
    path = save(model.state_dict())
    assert {tensor.dtype for tensor in ssmpretrain.load_encoder(path).parameters()} == {torch.float32}
    kept = ssmpretrain.load_encoder(path, keep_dtypes=True)
    assert {tensor.dtype for tensor in kept.parameters()} == {torch.bfloat16}
    assert same(kept, model)
    assert all(tensor.requires_grad for tensor in kept.parameters())


@torch.no_grad()
def test_another_image_size_resizes_the_position_embedding(save):
    model = encoder().eval()
    path = save(model.state_dict())
    images = torch.randn(1, 3, 96, 128)
    loaded = ssmpretrain.load_encoder(path, img_size=(96, 128)).eval()
    assert loaded.pos_embed.shape == (1, 49, 32)
    torch.testing.assert_close(loaded(images), model(images))
    assert "1 resized" in str(loaded.load_report)


def test_the_load_is_reported_in_one_line(save, caplog):
    path = save(encoder().state_dict())
    with caplog.at_level(logging.INFO, logger="ssmpretrain"):
        ssmpretrain.load_encoder(path, num_classes=0)
    expected = "73 of 73 tensors loaded, 0 resized, missing none, unexpected head.weight, head.bias"
    assert expected in caplog.text


# Refusals


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    mark, path = tmp_path / "was_here", tmp_path / "weights.pth"
    torch.save({"model": encoder().state_dict(), "extra": Attack(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pickles \w+.mkdir; .*the file is refused"):
        ssmpretrain.load_encoder(path)
    assert not mark.exists()


def test_a_missing_file_is_answered_with_what_lies_beside_it(save, tmp_path):
    save(encoder().state_dict(), "vim_t_76p1.pth")
    (tmp_path / "z.ckpt").symlink_to("/dev/zero")
    (tmp_path / "lost.ckpt").symlink_to("gone.ckpt")
    for path, message in {
        tmp_path / "z.ckpt": "path names a regular file; .*z.ckpt is a device",
        tmp_path / "lost.ckpt": "lost.ckpt is a link to gone.ckpt, which does not exist",
        tmp_path / "vim_t_76p2.pth": "no such file: .*Beside it: vim_t_76p1.pth",
        tmp_path / "runs" / "last.ckpt": "There is no folder .*runs either",
        tmp_path: "got the folder .*It holds .*vim_t_76p1.pth",
    }.items():
        with pytest.raises(ValueError, match=message):
            ssmpretrain.load_encoder(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"\(0 bytes\) is no checkpoint, or a truncated"),
        ("a.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.pth", bytes(range(256)), "is no checkpoint, or a truncated"),
        ("a.safetensors", b"\x00" * 4, "is damaged or no safetensors file"),
    ],
)
def test_something_else_than_a_checkpoint_is_said_to_be_that(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ssmpretrain.load_encoder(tmp_path / name)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_said_to_be_damaged(save, kept):
    path = save({"model": encoder().state_dict()})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="truncated or damaged"):
        ssmpretrain.load_encoder(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds no weights under model, state_dict, model_ema, state_dict_ema; it holds epoch"),
        ({}, "it holds nothing"),
        ({"model": {"fc.weight": torch.ones(1)}}, "is no Vim, .* or .*checkpoint.* 1 tensors start with fc.weight"),
        ({"blocks.0.attn.qkv.weight": torch.ones(1)}, "attention blocks, a ViT"),
        ({"layers.0.blocks.0.norm.weight": torch.ones(1)}, "a VMamba or Swin encoder"),
    ],
)
def test_other_contents_are_named(save, content, message):
    with pytest.raises(ValueError, match=message):
        ssmpretrain.load_encoder(save(content))


def test_a_vim_with_rotary_embedding_is_refused_by_name(save):
    state = encoder().state_dict() | {"rope.freqs_cos": torch.ones(16, 32)}
    for name in (None, "test_vim"):
        with pytest.raises(ValueError, match=r"rope.freqs_cos means rotary position embedding.*February 2024"):
            ssmpretrain.load_encoder(save(state), name)


def test_another_variant_than_named_is_refused_with_the_right_name(save):
    path = save(encoder(img_size=224).state_dict())
    with pytest.raises(ValueError, match=r"holds test_vim \(32 channels.*vim_tiny_patch16_224.*Pass name='test_vim'"):
        ssmpretrain.load_encoder(path, "vim_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"patch_size=8; .*patch_size=16 was asked for"):
        ssmpretrain.load_encoder(save(encoder(patch_size=8).state_dict()), "test_vim")
    with pytest.raises(ValueError, match=r"bidirectional='ssm_conv'; .*bidirectional='none' was asked for"):
        ssmpretrain.load_encoder(path, bidirectional="none")


def test_overlapping_patches_are_not_taken_for_adjoining_ones(save):
    path = save(encoder(img_size=224, stride=8).state_dict())
    with pytest.raises(ValueError, match=r"27 x 27 patches.*stride 16 was asked for.*img_size=432"):
        ssmpretrain.load_encoder(path, "test_vim")
    assert ssmpretrain.load_encoder(path, "test_vim", stride=8).patch_embed.img_size == (224, 224)
    assert ssmpretrain.load_encoder(path, "test_vim", img_size=432).patch_embed.stride == 16


def test_an_incomplete_file_is_refused_with_a_handful_of_names(save):
    state = encoder().state_dict()
    half = {name: tensor for i, (name, tensor) in enumerate(state.items()) if i % 2}
    with pytest.raises(ValueError, match=r"does not fill test_vim; of 75 tensors 3\d missing: .* and 3\d more"):
        ssmpretrain.load_encoder(save(half), "test_vim")
    del state["layers.2.norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing: layers.2.norm.weight\. Check"):
        ssmpretrain.load_encoder(save(state))


def test_a_file_that_lost_its_last_blocks_is_refused(save):
    state = {name: tensor for name, tensor in encoder().state_dict().items() if not name.startswith("layers.3.")}
    with pytest.raises(ValueError, match=r"holds 3 blocks of 32 channels; test_vim has 4.*pass depth=3"):
        ssmpretrain.load_encoder(save(state))
    assert len(ssmpretrain.load_encoder(save(state), depth=3).layers) == 3


def test_a_tensor_of_another_shape_is_listed_with_both_shapes(save):
    state = encoder().state_dict()
    state["layers.1.mixer.D"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"layers.1.mixer.D is \(3,\) in the file and \(64,\) in the encoder"):
        ssmpretrain.load_encoder(save(state))


def test_whole_numbers_are_not_taken_for_weights(save):
    state = encoder().state_dict()
    state["layers.1.mixer.D"] = torch.ones(64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"layers.1.mixer.D is \(64,\) of int8 in the file and \(64,\) in the encoder"):
        ssmpretrain.load_encoder(save(state))


def test_tensors_that_the_encoder_has_no_place_for_are_not_passed_over(save):
    state = encoder().state_dict()
    state["layers.0.mixer.extra"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"1 left over: layers.0.mixer.extra"):
        ssmpretrain.load_encoder(save(state))
    del state["layers.0.mixer.extra"]
    model = ssmpretrain.load_encoder(save(state | {"teacher.weight": torch.ones(1)}))
    assert model.load_report.unexpected == ("teacher.weight",)


def test_a_rectangular_grid_asks_for_its_size(save):
    path = save(encoder(img_size=(64, 96)).state_dict())
    with pytest.raises(ValueError, match=r"25 position rows, which is no square.*img_size=\(height, width\)"):
        ssmpretrain.load_encoder(path)
    assert ssmpretrain.load_encoder(path, img_size=(64, 96)).patch_embed.grid_size == (4, 6)


# Every kind of file


KINDS = ("run", "safetensors", "timm", "published")


def every_kind(folder: Path, model: torch.nn.Module, name: str, args: dict) -> dict[str, Path]:
    """One encoder as a run's checkpoint, as our exports, and as a published file."""
    state = {f"encoder.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "encoder": {"name": name, "args": args}}, folder / "last.ckpt")
    torch.save({"model": model.state_dict()}, folder / "published.pth")
    loaded = ssmpretrain.load_encoder(folder / "last.ckpt")
    exports = {
        format: ssmpretrain.save_encoder(loaded, folder / f"export{suffix}", format).path
        for format, suffix in {"safetensors": ".safetensors", "timm": ""}.items()
    }
    return {"run": folder / "last.ckpt", **exports, "published": folder / "published.pth"}


@pytest.fixture
def kinds(tmp_path) -> dict[str, Path]:
    return every_kind(tmp_path, encoder(), "test_vim", {"img_size": 64})


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_of_the_head_is_said(kinds, kind):
    for asked, said in {
        None: None,
        5: None,
        0: "head of 5 classes left out",
        7: "fresh head of 7 classes, the file has",
    }.items():
        model = ssmpretrain.load_encoder(kinds[kind], num_classes=asked)
        assert model.num_classes == (5 if asked is None else asked)
        assert [note.startswith(said or "") for note in model.load_report.notes if "head" in note] == [True] * bool(
            said
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_another_image_size_is_resized_and_said(kinds, kind):
    model = ssmpretrain.load_encoder(kinds[kind], img_size=(96, 128)).eval()
    images = torch.randn(1, 3, 96, 128)
    torch.testing.assert_close(model(images), encoder().eval()(images))
    assert "1 resized" in str(model.load_report)
    assert "positions resized from 4 x 4 to 6 x 8 patches" in str(model.load_report)


@pytest.mark.parametrize("kind", KINDS)
def test_another_patch_size_is_refused_with_the_remedy(kinds, kind):
    with pytest.raises(ValueError, match=r"[Pp]ass patch_size=16.*or for more tokens .* a smaller stride"):
        ssmpretrain.load_encoder(kinds[kind], patch_size=8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_that_does_not_fit_the_file_is_named(kinds, kind):
    with pytest.raises(ValueError, match=r"leave d_state out|Pass d_state=16"):
        ssmpretrain.load_encoder(kinds[kind], d_state=8)


@pytest.mark.parametrize("kind", ["run", "safetensors", "timm"])
def test_half_of_the_tensors_is_refused_from_every_kind_of_file(kinds, kind):
    path = kinds[kind]
    if kind == "run":
        content = torch.load(path, weights_only=True)
        content["state_dict"] = dict(list(content["state_dict"].items())[::2])
        torch.save(content, path)
    else:
        path = path / "model.safetensors" if kind == "timm" else path
        state = safetensors.torch.load_file(path)
        metadata = {"encoder": json.dumps({"name": "test_vim", "args": {"img_size": 64}})}
        safetensors.torch.save_file(dict(list(state.items())[::2]), path, metadata)
    with pytest.raises(ValueError, match=r"does not fill test_vim; of 7\d tensors 3\d missing: .* and 3\d more"):
        ssmpretrain.load_encoder(path)


@pytest.mark.parametrize("entry", ["encoder", "images", "data", "extra"])
def test_code_in_a_runs_checkpoint_is_refused_and_not_run(kinds, tmp_path, entry):
    content = torch.load(kinds["run"], weights_only=True)
    torch.save(content | {entry: Attack(tmp_path / "was_here")}, kinds["run"])
    with pytest.raises(ValueError, match=r"pickles \w+.mkdir; .*the file is refused"):
        ssmpretrain.load_encoder(kinds["run"])
    assert not (tmp_path / "was_here").exists()


def test_code_in_a_timm_folder_or_under_another_name_is_refused_and_not_run(kinds, tmp_path):
    weights = kinds["timm"] / "model.safetensors"
    torch.save({"model": Attack(tmp_path / "was_here")}, weights)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ssmpretrain.load_encoder(kinds["timm"])
    torch.save({"model": Attack(tmp_path / "was_here")}, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="the file is refused"):
        ssmpretrain.load_encoder(tmp_path / "weights.bin")
    assert not (tmp_path / "was_here").exists()


# Longer sequences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_token", ["middle", "double", "none"])
def test_a_smaller_stride_resizes_the_positions_around_the_class_token(tmp_path, kind, class_token):
    args = {"img_size": 64, "class_token": class_token}
    model = encoder(**args)
    path = every_kind(tmp_path, model, "test_vim", args)[kind]
    finer = ssmpretrain.load_encoder(path, stride=8, img_size=64, class_token=class_token)
    assert finer.patch_embed.grid_size == (7, 7)
    assert "positions resized from 4 x 4 to 7 x 7 patches" in str(finer.load_report)
    rows, tokens = remove_class_tokens(model.pos_embed, class_token)
    finer_rows, finer_tokens = remove_class_tokens(finer.pos_embed, class_token)
    assert torch.equal(finer_tokens, tokens)  # the class token's row, at its new place
    assert torch.equal(finer_rows, resize_grid(rows, (4, 4), (7, 7)))


@pytest.mark.slow
def test_the_long_sequence_name_is_filled_from_the_short_ones_weights(tmp_path):
    args = {"depth": 24, "num_classes": 0}
    short = ssmpretrain.create_encoder("vim_tiny_patch16_224", **args)
    paths = every_kind(tmp_path, short, "vim_tiny_patch16_224", {})
    for kind, path in paths.items():
        options = {"img_size": 224} if kind == "published" else {}
        long = ssmpretrain.load_encoder(path, name="vim_tiny_patch16_stride8_224", **options)
        assert long.pos_embed.shape == (1, 730, 192)
        assert torch.equal(long.pos_embed[:, 364], short.pos_embed[:, 98])
        assert "from 14 x 14 to 27 x 27" in str(long.load_report)
    with pytest.raises(ValueError, match=r"stride 8 was asked for.*or stride=8 and img_size=224 to have its positions"):
        ssmpretrain.load_encoder(paths["published"], name="vim_tiny_patch16_stride8_224")
    again = ssmpretrain.save_encoder(long, tmp_path / "long.safetensors").path
    assert ssmpretrain.load_encoder(again).load_report.resized == ()


def test_a_name_that_says_nothing_of_the_mixer_takes_the_files(tmp_path):
    args = {"depth": 24, "embed_dim": 192, "num_classes": 0}
    normed = ssmpretrain.create_encoder("vim_tiny_patch16_scannorm_224", num_classes=0)
    for path in every_kind(tmp_path, normed, "vim_tiny_patch16_scannorm_224", {}).values():
        assert ssmpretrain.load_encoder(path).load_report.encoder == "vim_tiny_patch16_scannorm_224"
        model = ssmpretrain.load_encoder(path, name="vim_tiny_patch16_224", drop_path_rate=0.3)
        assert same(model, normed) and model.load_report.args["scan_norm"]
    torch.save(ssmpretrain.create_encoder("test_vim", **args).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"scan_norm=False; .*scan_norm=True was asked for. Pass .*_patch16_224'"):
        ssmpretrain.load_encoder(tmp_path / "plain.pth", name="vim_tiny_patch16_scannorm_224")


def test_a_run_in_another_stride_and_size_is_measured_by_its_own(tmp_path):
    args = {"img_size": [48, 64], "stride": 8}
    path = every_kind(tmp_path, encoder(**args), "test_vim", args)["run"]
    assert ssmpretrain.load_encoder(path).load_report.resized == ()
    assert "from 5 x 7 to 3 x 4 patches" in str(ssmpretrain.load_encoder(path, stride=16).load_report)


# Maps of features


@torch.no_grad()
@pytest.mark.parametrize("kind", ["run", "safetensors", "timm"])
@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("test_vim", {"img_size": 64}, {"img_size": 96, "num_classes": 3}),
        ("test_vmamba", {}, {}),
        ("test_arm", {"img_size": 64}, {}),
        ("test_vit", {"img_size": 64}, {"img_size": 96}),
        ("test_mambaout", {}, {}),  # whose modules timm renames
        ("swin_tiny_patch4_window7_224", TIMMS["swin_tiny_patch4_window7_224"], {}),
    ],
)
def test_features_are_those_of_the_whole_encoder(tmp_path, kind, name, args, options):
    torch.manual_seed(0)
    path = every_kind(tmp_path, ssmpretrain.create_encoder(name, num_classes=5, **args), name, args)[kind]
    wrapped = ssmpretrain.load_encoder(path, features_only=True, out_indices=[0, 1], **options).eval()
    whole = ssmpretrain.load_encoder(path, **options).eval()
    images = torch.randn(2, 3, *[options.get("img_size", 64)] * 2)
    expected = whole.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    for ours, map in zip(wrapped(images), expected, strict=True):
        channels_last = str(getattr(wrapped, "output_fmt", "")).endswith("NHWC")  # Swin's and MambaOut's
        channels_first = ours.permute(0, 3, 1, 2) if channels_last else ours
        torch.testing.assert_close(channels_first, map)
    assert wrapped.feature_info.channels() == [map.shape[1] for map in expected]
    assert wrapped.load_report.loaded == whole.load_report.loaded


@pytest.mark.parametrize("kind", ["run", "safetensors", "timm"])
def test_timms_encoders_are_resized_after_filling_and_say_so(tmp_path, kind):
    torch.manual_seed(0)
    args = {"img_size": 64}
    model = ssmpretrain.create_encoder("test_vit", **args)
    path = every_kind(tmp_path, model, "test_vit", args)[kind]
    loaded = ssmpretrain.load_encoder(path, img_size=(96, 64))
    model.set_input_size((96, 64))
    assert same(loaded, model)
    assert loaded.load_report.resized == ("pos_embed",)
    assert "positions resized from 4 x 4 to 6 x 4 patches" in str(loaded.load_report)
