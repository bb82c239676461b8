"""Graphs of dense runs, against the objective that they were traced from."""

import json

import onnx
import onnxruntime
import pytest
import torch

from ssmpretrain import load_encoder
from ssmpretrain.cli import main
from ssmpretrain.encoders.weights.preprocessing import images_of
from ssmpretrain.objectives import Detection, Segmentation
from ssmpretrain.objectives.dense.detectors import Neck
from ssmpretrain.objectives.dense.heads import FCN, Linear, UPerNet

_SMALL = {"test_vim": {"depth": 2, "embed_dim": 16}, "test_vmamba": {"depths": (1, 1), "embed_dim": 8}}


def run_of(tmp_path, kind, encoder, **settings):
    """Return an objective with weights, and the path of a checkpoint of it."""
    torch.manual_seed(0)
    model = kind(encoder=encoder, encoder_args=dict(_SMALL[encoder]), num_classes=3, **settings).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.3)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 4}
    model.on_save_checkpoint(content)
    content["images"] = {**images_of(model.encoder), "size": [32, 48]}
    torch.save(content, tmp_path / "run.ckpt")
    return model, str(tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("kind", "settings", "printed"),
    [
        (Segmentation, {"head": Linear()}, "to logits"),
        (Detection, {"neck": Neck(width=8)}, "to map_4, map_8, map_16, map_32, map_64, of encoder and neck"),
    ],
)
def test_the_export_of_a_dense_run_says_what_the_graph_holds(tmp_path, capsys, monkeypatch, kind, settings, printed):
    _, path = run_of(tmp_path, kind, "test_vim", **settings)
    held = {}

    def write_traced(path, format, model, images, about, outputs):
        held.update(images=images, about=about, outputs=outputs, shapes=[one.shape[1:] for one in _run(model, images)])
        path.write_bytes(b"")
        return 0.0

    monkeypatch.setattr("ssmpretrain.objectives.dense.export.write_traced", write_traced)
    assert main(["export", path, str(tmp_path / "a.onnx"), "--format", "onnx", "--image-size", "37x53"]) == 0
    assert f"images (B, 3, 37, 53) {printed}" in capsys.readouterr().out
    assert held["images"] == (3, 37, 53) and len(held["shapes"]) == len(held["outputs"])
    assert held["about"]["dense"]["objective"] == kind.__name__
    if kind is Segmentation:
        assert held["shapes"] == [(3, 37, 53)]


def _run(model, images):
    with torch.no_grad():
        outputs = model(torch.zeros(1, *images))
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs


@pytest.mark.slow
@torch.no_grad()
def test_a_segmentation_run_becomes_a_program_from_images_of_any_size_to_logits(tmp_path, capsys):
    model, path = run_of(tmp_path, Segmentation, "test_vim", head=Linear())
    assert main(["export", path, str(tmp_path / "a.pt2"), "--format", "torch_export", "--image-size", "37x53"]) == 0
    assert "wrote Segmentation with test_vim" in (printed := capsys.readouterr().out)
    assert "images (B, 3, 37, 53) to logits" in printed
    files = {"ssmpretrain.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    for count in (1, 3):
        images = torch.randn(count, 3, 37, 53)
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)
    about = json.loads(files["ssmpretrain.json"])
    assert about["dense"] == {"objective": "Segmentation", "num_classes": 3, "outputs": ["logits"]}
    assert about["images"]["size"] == [37, 53] and about["origin"]["epoch"] == 4


def test_the_encoder_alone_is_exported_in_the_other_formats(tmp_path, capsys):
    model, path = run_of(tmp_path, Segmentation, "test_vim", head=Linear())
    assert main(["export", path, str(tmp_path / "a.safetensors")]) == 0
    encoder = load_encoder(tmp_path / "a.safetensors")
    assert torch.equal(encoder.layers[1].mixer.in_proj.weight, model.encoder.layers[1].mixer.in_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "encoder", "settings"),
    [
        (Segmentation, "test_vmamba", {"head": UPerNet(channels=8), "auxiliary": FCN(channels=8, map=-1)}),
        (Detection, "test_vim", {"neck": Neck(width=8)}),
        (Detection, "test_vmamba", {"neck": Neck(width=8)}),
    ],
)
@torch.no_grad()
def test_onnx_answers_as_the_run(tmp_path, kind, encoder, settings):
    model, path = run_of(tmp_path, kind, encoder, **settings)
    assert main(["export", path, str(tmp_path / "a.onnx"), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 32, 48)
    is_segmentation = kind is Segmentation
    expected = [model(images)] if is_segmentation else model.maps(images)
    names = ["logits"] if is_segmentation else [f"map_{stride}" for stride in model.neck.strides]
    assert [one.name for one in session.get_outputs()] == names
    for found, one in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), one, rtol=1e-3, atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(metadata["ssmpretrain"])["dense"]["outputs"] == names
