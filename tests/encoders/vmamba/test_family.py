import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.vmamba.family import FAMILY
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS, VMamba

V0 = VARIANTS["vmamba_tiny_v0"]


def encoder(**options) -> VMamba:
    torch.manual_seed(0)
    return ssmpretrain.create_encoder("test_vmamba", **{"num_classes": 5, **options})


@pytest.fixture
def save(tmp_path):
    def save(content, name: str = "weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def oldest_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the first published files have."""
    renames = {"patch_embed.0.": "patch_embed.proj.", "patch_embed.2.": "patch_embed.norm.", "classifier.": ""}
    old = {}
    for name, tensor in state.items():
        for new, before in renames.items():
            name = name.replace(new, before)
        name = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", name)
        old[re.sub(r"(blocks\.\d+)\.op\.", r"\1.self_attention.", name)] = tensor
    return old


@torch.no_grad()
def test_a_published_file_answers_as_published(save, goldens, formula):
    shapes = json.loads((goldens / "vmamba_tiny_s1l8.json").read_text())
    state = {name: torch.from_numpy(formula.weight(name, tuple(shape))).float() for name, shape in shapes.items()}
    model = ssmpretrain.load_encoder(save({"model": state, "epoch": 264})).eval()
    report = model.load_report
    assert (report.encoder, report.loaded, report.total) == ("vmamba_tiny_s1l8", len(shapes), len(shapes))
    golden = np.load(goldens / "vmamba_tiny_s1l8.npz")["logits"]
    answer = model(formula.images()).numpy()
    assert np.linalg.norm(answer - golden) / np.linalg.norm(golden) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_from_its_shapes(name):
    with torch.device("meta"):
        state = ssmpretrain.create_encoder(name).state_dict()
    assert FAMILY.variant_name(FAMILY.recognise(state)) == name


@pytest.mark.parametrize(
    "options",
    [
        {},
        V0 | {"embed_dim": 8, "depths": (1, 2)},
        {"embed_dim": (8, 24, 40), "depths": (1, 1, 2), "mlp_ratio": 2.5, "downsample": "conv2", "in_chans": 1},
        {"dt_rank": 3, "d_state": 4, "d_conv": 5, "conv_bias": True, "ssm_ratio": 1.5, "num_classes": 0},
        {"gate": True, "stem": "patch", "depths": (1,), "embed_dim": 8},
    ],
    ids=["published", "v0", "sizes", "mixer", "one stage"],
)
def test_every_option_that_leaves_a_trace_is_recognised(save, options):
    model = encoder(**options)
    depths = {"depths": options["depths"]} if "depths" in options else {}
    assert same(ssmpretrain.load_encoder(save(model.state_dict()), **depths), model)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"model_ema": s, "epoch": 3}])
def test_the_three_published_wrappings_load(save, wrap):
    model = encoder()
    assert same(ssmpretrain.load_encoder(save(wrap(model.state_dict()))), model)


def test_the_average_is_taken_when_asked_for(save):
    trained, averaged = encoder(), encoder()
    with torch.no_grad():
        averaged.get_classifier().bias.fill_(1)
    path = save({"model": trained.state_dict(), "model_ema": averaged.state_dict()})
    assert same(ssmpretrain.load_encoder(path), trained)
    assert same(ssmpretrain.load_encoder(path, ema=True), averaged)


def test_projections_stored_as_convolutions_load(save):
    model = encoder()
    state = model.state_dict()
    for name in state:
        if name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            state[name] = state[name][:, :, None, None]
    assert same(ssmpretrain.load_encoder(save({"model": state})), model)


def test_a_convolution_in_another_place_keeps_its_shape():
    state = {
        "patch_embed.0.weight": torch.ones(4, 3, 1, 1),
        "layers.0.blocks.0.op.conv2d.weight": torch.ones(8, 1, 1, 1),
    }
    assert {
        name: tensor.ndim for name, tensor in FAMILY.current_names(state, Path("x.pth"), {}).items()
    } == dict.fromkeys(state, 4)


def test_the_oldest_files_load(save):
    model = encoder(**V0 | {"embed_dim": 8, "depths": (1, 2)})
    state = oldest_names(model.state_dict())
    assert {"patch_embed.proj.weight", "patch_embed.norm.bias", "norm.weight", "head.bias"} <= state.keys()
    assert {"layers.1.blocks.1.ln_1.weight", "layers.0.blocks.0.self_attention.A_logs"} <= state.keys()
    assert "layers.0.downsample.norm.weight" in state
    for name in (None, "test_vmamba"):
        options = V0 | {"embed_dim": 8, "depths": (1, 2)} if name else {"depths": (1, 2)}
        assert same(ssmpretrain.load_encoder(save({"model": state}), name, **options), model)


@torch.no_grad()
def test_the_scan_leaves_no_trace_and_can_be_said(save):
    model = encoder(scan="bidirectional").eval()
    path = save(model.state_dict())
    loaded = ssmpretrain.load_encoder(path, scan="bidirectional").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    two = encoder(scan=("h", "v_flip"))
    path = save(two.state_dict())
    assert same(ssmpretrain.load_encoder(path, scan=["h", "v_flip"]), two)
    with pytest.raises(ValueError, match=r"x_proj_weight is \(2, 3, 16\) in the file and \(4, 3, 16\) in the encoder"):
        ssmpretrain.load_encoder(path)


def test_our_checkpoint_says_how_its_encoder_was_built(save):
    args = {"scan": "bidirectional", "num_classes": 0, "depths": [1, 1], "embed_dim": 8}
    model = encoder(**args)
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {
        "state_dict": state,
        "encoder": {"name": "test_vmamba", "args": args},
        "pytorch-lightning_version": "2.6",
    }
    loaded = ssmpretrain.load_encoder(save(content, "last.ckpt"))
    assert same(loaded, model)
    assert loaded.layers[0].blocks[0].op.scan == "bidirectional"


def test_the_head_is_kept_dropped_or_made_afresh(save):
    model = encoder()
    path = save(model.state_dict())
    assert ssmpretrain.load_encoder(path).num_classes == 5
    dropped = ssmpretrain.load_encoder(path, num_classes=0)
    assert dropped.load_report.unexpected == ("classifier.head.weight", "classifier.head.bias")
    assert dropped(torch.randn(1, 3, 64, 64)).shape == (1, 128)
    fresh = ssmpretrain.load_encoder(path, num_classes=7)
    assert fresh.get_classifier().weight.shape == (7, 128)
    assert fresh.load_report.fresh == ("classifier.head.weight", "classifier.head.bias")


def test_depths_may_be_said_as_a_recipe_does(save):
    model = encoder()
    assert same(ssmpretrain.load_encoder(save(model.state_dict()), "test_vmamba", depths=[1, 1, 2, 1]), model)


# Refusals


def test_another_variant_than_named_is_refused_with_the_right_name(save):
    path = save(encoder().state_dict())
    with pytest.raises(ValueError, match=r"holds test_vmamba .*vmamba_tiny_v0 with .*Pass name='test_vmamba'"):
        ssmpretrain.load_encoder(path, "vmamba_tiny_v0")
    with pytest.raises(ValueError, match=r"gate=False; .* gate=True was asked for. Pass gate=False"):
        ssmpretrain.load_encoder(path, "test_vmamba", gate=True)
    with pytest.raises(ValueError, match="a VMamba or Swin encoder"):
        ssmpretrain.load_encoder(path, "test_vim")


def test_an_incomplete_file_is_refused_with_a_handful_of_names(save):
    state = encoder().state_dict()
    half = {name: tensor for i, (name, tensor) in enumerate(state.items()) if i % 2}
    for name in ("test_vmamba", None):
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more|too little of one to recognise"):
            ssmpretrain.load_encoder(save(half), name)
    for lost in ("layers.0.blocks.0.op.A_logs", "layers.3.blocks.0.mlp.fc1.weight", "classifier.norm.bias"):
        rest = {name: tensor for name, tensor in state.items() if name != lost}
        for name in ("test_vmamba", None):
            with pytest.raises(ValueError, match=rf"1 missing: {re.escape(lost)}\. Check"):
                ssmpretrain.load_encoder(save(rest), name)


@pytest.mark.parametrize("lost", ["layers.2.blocks.1.", "layers.3."])
def test_a_file_that_lost_its_last_blocks_is_refused(save, lost):
    state = {name: tensor for name, tensor in encoder().state_dict().items() if not name.startswith(lost)}
    with pytest.raises(ValueError, match=r"blocks of 16 channels; test_vmamba has \(1, 1, 2, 1\).*pass depths=\("):
        ssmpretrain.load_encoder(save(state))


def test_tensors_that_the_encoder_has_no_place_for_are_not_passed_over(save):
    state = encoder().state_dict() | {"layers.0.blocks.0.op.extra": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 left over: layers.0.blocks.0.op.extra"):
        ssmpretrain.load_encoder(save(state))


def test_a_file_without_the_final_norm_and_without_norms_of_its_stages_is_refused(save):
    state = {name: tensor for name, tensor in encoder().state_dict().items() if not name.startswith("classifier.")}
    with pytest.raises(ValueError, match=r"2 missing: classifier.norm.weight, classifier.norm.bias"):
        ssmpretrain.load_encoder(save({"state_dict": {f"backbone.{name}": t for name, t in state.items()}}))
