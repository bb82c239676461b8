"""Files and masked images of Vim2: recognise, load, refuse, hide patches, export."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.vim2 import FAMILY, VARIANTS, Vim2, Vim2Blocks
from ssmpretrain.objectives import MAE, SimMIM


def encoder(**options) -> Vim2:
    """A small encoder in which no two directions and no two channels are alike."""
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder("test_vim2", **{"num_classes": 0, "img_size": 64, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def save(tmp_path):
    def save(content, name: str = "weights.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


# Files


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_from_its_shapes(name):
    with torch.device("meta"):
        model = ssmpretrain.create_encoder(name)
    found = FAMILY.recognise(model.state_dict())
    assert FAMILY.variant_name(found) == name and found["img_size"] == 224
    assert model.mlp_ratio == found["mlp_ratio"] and model.mixer.head_dim == found["head_dim"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": "none", "mlp_ratio": 0, "class_token": "none"},
        {"bidirectional": "separate", "class_token": "double"},
        {"d_state": 5, "head_dim": 8, "d_conv": 3, "expand": 1.5, "mlp_ratio": 2.5},
        {"attention_blocks": 1, "class_token": "registers", "num_registers": 3},
    ],
    ids=["registered", "none", "separate", "sizes", "attention"],
)
def test_every_option_that_leaves_a_trace_is_recognised(save, options):
    model = encoder(**options)
    loaded = ssmpretrain.load_encoder(save({"model": model.state_dict()}))
    assert same(loaded, model)
    for name in ("bidirectional", "d_state", "head_dim", "d_conv", "inner"):
        assert getattr(loaded.mixer, name) == getattr(model.mixer, name)


@torch.no_grad()
def test_a_safetensors_file_keeps_what_no_tensor_shows(tmp_path):
    model = encoder(num_groups=2, divide_output=False).eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.safetensors")
    loaded = ssmpretrain.load_encoder(saved.path).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert loaded.mixer.num_groups == 2 and not loaded.mixer.divide_output


@torch.no_grad()
def test_a_run_is_loaded_at_another_size_with_resized_positions(save):
    state = {f"encoder.{name}": tensor for name, tensor in encoder().state_dict().items()}
    run = save({"state_dict": state, "encoder": {"name": "test_vim2", "args": {"img_size": 64}}}, "last.ckpt")
    assert same(ssmpretrain.load_encoder(run), encoder())
    wide = ssmpretrain.load_encoder(run, img_size=96, num_classes=3)
    assert wide.load_report.resized == ("pos_embed",) and wide.load_report.fresh == ("head.weight", "head.bias")
    assert wide(torch.randn(1, 3, 96, 96)).shape == (1, 3)


def test_an_incomplete_file_is_refused_with_the_name(save):
    state = encoder().state_dict()
    for lost in ("layers.0.mixer.A_log_b", "layers.3.mixer.out_proj.weight", "layers.1.mlp.fc1.weight"):
        rest = {name: tensor for name, tensor in state.items() if name != lost}
        with pytest.raises(ValueError, match=f"1 missing: {lost}"):
            ssmpretrain.load_encoder(save(rest))


def test_dino_mambas_tensors_are_refused_unless_named(save):
    path = save({"model": encoder(bidirectional="separate", mlp_ratio=0).state_dict()})
    with pytest.raises(ValueError, match=r"has the tensors of Dino-Mamba, whose sequence holds the class token twice"):
        ssmpretrain.load_encoder(path)
    loaded = ssmpretrain.load_encoder(path, "test_vim2", bidirectional="separate", mlp_ratio=0, img_size=64)
    assert loaded.mixer.bidirectional == "separate" and loaded.load_report.fresh == ()


def test_vim_and_vim2_refuse_each_others_files(save):
    path = save(encoder().state_dict())
    with pytest.raises(ValueError, match=r"not a Vim of this package: .*vim2_\*"):
        ssmpretrain.load_encoder(path, "test_vim")
    vim = ssmpretrain.create_encoder("test_vim", num_classes=0, img_size=64)
    path = save(vim.state_dict())
    with pytest.raises(ValueError, match=r"not a Vim2 of this package: .*x_proj.* means .*vim_\*"):
        ssmpretrain.load_encoder(path, "test_vim2")
    assert same(ssmpretrain.load_encoder(path), vim)


# Masked images


@torch.no_grad()
@pytest.mark.parametrize("directions", ["shared", "separate", "none"])
def test_with_everything_visible_the_features_are_those_of_the_image(directions):
    model, images = encoder(bidirectional=directions), torch.randn(2, 3, 64, 64)
    ours = FAMILY.forward_visible(model, images, torch.arange(16).expand(2, -1))
    assert torch.equal(ours, model.forward_features(images))


def test_hidden_pixels_change_no_bit_and_get_no_gradient():
    model, images = encoder(), torch.randn(2, 3, 64, 64)
    keep = torch.tensor([[0, 5, 6, 11, 15], [1, 2, 3, 8, 9]])
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False).view(2, 1, 4, 4)
    hidden = hidden.repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(images)
    runs = []
    for content in (0.0, torch.nan):
        leaf = images.masked_fill(hidden, content).requires_grad_()
        features = FAMILY.forward_visible(model, leaf, keep)
        (dimages,) = torch.autograd.grad(features.square().sum(), leaf)
        assert not dimages[hidden].any() and dimages[~hidden].any()
        runs.append((features, dimages[~hidden]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@torch.no_grad()
def test_visible_patches_are_read_as_a_sequence_of_their_own():
    model, images = encoder(), torch.randn(1, 3, 64, 64)
    keep = torch.tensor([[2, 3, 7, 12]])
    features = FAMILY.forward_visible(model, images, keep)
    assert torch.equal(features, model.forward_tokens(model.embed(images)[:, keep[0]]))
    class_feature, patches = FAMILY.class_and_patches(model, features)
    assert torch.equal(class_feature, features[:, 2]) and patches.shape == (1, 4, 32)


@pytest.mark.parametrize("options", [{"bidirectional": "separate", "mlp_ratio": 0}, {"num_groups": 2, "d_conv": 3}])
def test_a_decoder_has_the_encoders_mixers(options):
    model = encoder(**options)
    decoder = FAMILY.decoder(model, 2, 16)
    assert isinstance(decoder, Vim2Blocks) and len(decoder.layers) == 2
    for block in decoder.layers:
        for name in ("bidirectional", "num_groups", "d_conv", "d_state", "head_dim"):
            assert getattr(block.mixer, name) == getattr(model.mixer, name)
        assert (block.mlp is None) == (model.layers[0].mlp is None)


@pytest.mark.parametrize("objective", [MAE, SimMIM])
def test_masked_pretraining_lowers_its_loss(objective):
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 16, "decoder_depth": 1} if objective is MAE else {}
    model = objective(encoder="test_vim2", encoder_args={"img_size": 64}, **sizes)
    images = torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model.loss(images, model.reconstruct(images, torch.Generator().manual_seed(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in idle if "mixer" in name or "mlp" in name] == []


# Graphs


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bidirectional": "separate", "mlp_ratio": 0}], ids=["shared", "separate"])
def test_onnx_holds_no_loop_and_answers_at_three_batch_sizes(tmp_path, options):
    model = encoder(depth=1, img_size=(32, 48), num_classes=5, **options).eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.onnx", "onnx")
    nodes = onnx.load(saved.path).graph.node
    kinds = {node.op_type for node in nodes}
    assert "MatMul" in kinds and not kinds & {"Scan", "Loop", "If"} and {node.domain for node in nodes} == {""}
    session = onnxruntime.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 48)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = model(images)
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_a_program_answers_at_three_batch_sizes(tmp_path):
    model = encoder(depth=1, num_classes=5).eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.pt2", "torch_export")
    program = torch.export.load(saved.path).module()
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 64, 64)
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
