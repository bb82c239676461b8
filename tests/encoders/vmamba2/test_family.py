"""Files of VMamba2: recognise, load, refuse, export."""

import re

import onnx
import onnxruntime
import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.vmamba2.family import FAMILY
from ssmpretrain.encoders.vmamba2.vmamba2 import VARIANTS, VMamba2


def encoder(**options) -> VMamba2:
    torch.manual_seed(0)
    return ssmpretrain.create_encoder("test_vmamba2", **{"num_classes": 5, **options})


@pytest.fixture
def save(tmp_path):
    def save(content, name: str = "weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_from_its_shapes(name):
    with torch.device("meta"):
        state = ssmpretrain.create_encoder(name).state_dict()
    assert FAMILY.variant_name(FAMILY.recognise(state)) == name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"embed_dim": (8, 24, 40), "depths": (1, 1, 2), "mlp_ratio": 2.5, "downsample": "conv2", "in_chans": 1},
        {"d_state": 5, "head_dim": 4, "d_conv": 5, "conv_bias": True, "ssm_ratio": 1.5, "num_classes": 0},
        {"gate": True, "stem": "patch", "downsample": "merge", "mlp_ratio": 0, "depths": (1, 2), "embed_dim": 8},
    ],
    ids=["registered", "sizes", "mixer", "gated"],
)
def test_every_option_that_leaves_a_trace_is_recognised(save, options):
    model = encoder(**options)
    depths = {"depths": options["depths"]} if "depths" in options else {}
    assert same(ssmpretrain.load_encoder(save({"model": model.state_dict()}), **depths), model)


@torch.no_grad()
def test_a_safetensors_file_keeps_the_scan(tmp_path):
    model = encoder(scan="bidirectional").eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.safetensors")
    loaded = ssmpretrain.load_encoder(saved.path).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert loaded.mixer.scan == "bidirectional"


def test_an_incomplete_file_is_refused_with_the_name(save):
    state = encoder().state_dict()
    for lost in ("layers.0.blocks.0.op.A_logs", "layers.0.blocks.0.op.in_proj.weight", "layers.1.blocks.0.op.dt_bias"):
        rest = {name: tensor for name, tensor in state.items() if name != lost}
        for name in ("test_vmamba2", None):
            with pytest.raises(ValueError, match=rf"1 missing: {re.escape(lost)}\. Check"):
                ssmpretrain.load_encoder(save(rest), name)


def test_a_damaged_tensor_is_refused_in_one_sentence(save):
    state = encoder().state_dict()
    for shape in ((4, 0), (4, 99), (4,), ()):
        damaged = {name: torch.ones(shape) if name.endswith("A_logs") else tensor for name, tensor in state.items()}
        with pytest.raises(ValueError, match="load_encoder: "):
            ssmpretrain.load_encoder(save(damaged))


def test_another_size_than_named_is_refused_with_the_right_name(save):
    path = save(encoder().state_dict())
    with pytest.raises(ValueError, match=r"holds test_vmamba2 .*vmamba2_tiny with .*Pass name='test_vmamba2'"):
        ssmpretrain.load_encoder(path, "vmamba2_tiny")
    with pytest.raises(ValueError, match=r"gate=False; .* gate=True was asked for. Pass gate=False"):
        ssmpretrain.load_encoder(path, "test_vmamba2", gate=True)


def test_the_two_families_refuse_each_others_files(save):
    path = save(encoder().state_dict())
    with pytest.raises(ValueError, match=r"no. a VMamba of this package: .*dt_bias means .* vmamba2_\*"):
        ssmpretrain.load_encoder(path, "vmamba_tiny_s1l8")
    path = save(ssmpretrain.create_encoder("test_vmamba").state_dict())
    with pytest.raises(ValueError, match=r"not a VMamba2 of this package: .*x_proj_weight means .* vmamba_\*"):
        ssmpretrain.load_encoder(path, "test_vmamba2")
    assert type(ssmpretrain.load_encoder(path)).__name__ == "VMamba"


@pytest.mark.parametrize("name", [None, "vmamba2_tiny"])
def test_the_published_form_of_mamba_2_is_refused_by_name(save, name):
    """MzeroMiko/VMamba's form m2 has one A and one bias for a head, and projections of each route."""
    state = ssmpretrain.create_encoder("test_vmamba", num_classes=5).state_dict()
    for key in [key for key in state if ".op." in key]:
        heads, inner = 2, state[re.sub(r"\.op\..*", ".op.out_proj.weight", key)].shape[1]
        if key.endswith("dt_projs_weight"):
            del state[key]
        elif key.endswith(("A_logs", "dt_projs_bias")):
            state[key] = torch.zeros(4, heads)
        elif key.endswith("Ds"):
            state[key] = torch.ones(4, heads, inner // heads)
        elif key.endswith("x_proj_weight"):
            state[key] = torch.ones(4, heads + 2 * 64, inner)
    with pytest.raises(
        ValueError, match=r"x_proj_weight means .* MzeroMiko/VMamba .* form m2 .* VMamba2 projects them"
    ):
        ssmpretrain.load_encoder(save({"model": state}), name)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_holds_no_loop_and_answers_at_three_batch_sizes(tmp_path):
    model = encoder(depths=(1, 1), embed_dim=8).eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.onnx", "onnx", img_size=(40, 48))
    nodes = {node.op_type for node in onnx.load(saved.path).graph.node}
    assert "MatMul" in nodes and not nodes & {"Scan", "Loop", "If"}
    session = onnxruntime.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 40, 48)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = model(images)
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()
