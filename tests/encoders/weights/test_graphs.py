"""Programs of torch.export and ONNX models, against the encoder that they were traced from."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

import ssmpretrain
from ssmpretrain.encoders.weights import graphs as traced

# Small ones of every kind: the graph of a block does not depend on how many there are. ONNX is slow to write.
ENCODERS = [
    ("test_vim", {"depth": 1, "img_size": 48, "stride": 8}, ["onnx", "torch_export"]),
    ("test_vim", {"depth": 2, "img_size": 32, "bidirectional": "layer", "class_token": "double"}, ["torch_export"]),
    ("test_vim", {"depth": 1, "img_size": 32, "bidirectional": "ssm", "num_classes": 0}, ["torch_export"]),
    ("test_vmamba", {"depths": (1, 1), "embed_dim": 8}, ["torch_export"]),
    ("vmamba_tiny_v0", {"depths": (1, 1), "embed_dim": 8, "d_state": 16}, ["onnx"]),
    ("test_vmamba2", {"depths": (1, 1), "embed_dim": 8}, ["torch_export"]),
    ("test_arm", {"depth": 1, "img_size": 32}, ["torch_export"]),
    ("test_arm", {"depth": 1, "img_size": (32, 48), "directions": 1}, ["onnx"]),
    ("test_vit", {"img_size": 32}, ["onnx", "torch_export"]),
    ("test_mambaout", {}, ["onnx", "torch_export"]),
]
# All of them take minutes: one of Vim and one of VMamba always, and both formats.
ALWAYS = (("test_vim", "onnx"), ("test_vmamba", "torch_export"))
CASES = [
    pytest.param(name, args, format, marks=[] if (name, format) in ALWAYS else [pytest.mark.slow])
    for name, args, formats in ENCODERS
    for format in formats
]
SUFFIXES = {"torch_export": ".pt2", "onnx": ".onnx"}
SMALLEST = {"depth": 1, "embed_dim": 16, "img_size": 32}


def encoder(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return ssmpretrain.create_encoder(name, **options)


def answer_of(path: Path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
@pytest.mark.parametrize(("name", "args", "format"), CASES)
def test_what_is_written_answers_as_the_encoder_in_any_batch(tmp_path, name, args, format):
    model = encoder(name, **args)
    size = None if "img_size" in args else (32, 64)
    saved = ssmpretrain.save_encoder(model, tmp_path / f"a{SUFFIXES[format]}", format, img_size=size)
    assert model.training
    height, width = size or ssmpretrain.encoders.weights.preprocessing.images_of(model)["size"]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, height, width)
        expected = model.eval()(images)
        found = answer_of(saved.path, images)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert f"differs by {saved.difference:.1e}" in str(saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8"])
@pytest.mark.parametrize("format", SUFFIXES)
def test_published_sizes_are_exported(tmp_path, format, name):
    saved = ssmpretrain.save_encoder(encoder(name), tmp_path / f"a{SUFFIXES[format]}", format)
    assert saved.difference < 1e-5


def test_a_program_runs_where_this_package_is_not(tmp_path):
    model = encoder("test_vim", **SMALLEST).eval()
    saved = ssmpretrain.save_encoder(model, tmp_path / "a.pt2", "torch_export")
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\nsys.modules['ssmpretrain'] = sys.modules['timm'] = None\n"
        f"program = torch.export.load({str(saved.path)!r})\n"
        "graphs = [one for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]\n"
        "called = [str(node.target) for one in graphs for node in one.graph.nodes if node.op == 'call_function']\n"
        "print(sorted({target.split('.')[0] for target in called}))\n"
        f"answer = program.module()(torch.load({str(tmp_path / 'images.pt')!r}))\n"
        f"torch.save(answer, {str(tmp_path / 'answer.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['<built-in function getitem>', 'aten', 'scan']"
    torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), model(images), rtol=1e-5, atol=1e-6)


def test_both_say_what_they_hold_and_nothing_of_this_machine(tmp_path):
    ssmpretrain.save_encoder(encoder("test_vim", **SMALLEST), tmp_path / "a.pt2", "torch_export", img_size=(32, 48))
    extra = {"ssmpretrain.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    ssmpretrain.save_encoder(encoder("test_vit", num_classes=0), tmp_path / "a.onnx", "onnx", img_size=(32, 48))
    content = onnx.load(tmp_path / "a.onnx")
    assert [value.name for value in (*content.graph.input, *content.graph.output)] == ["images", "features"]
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    for name, words in {"test_vim": extra["ssmpretrain.json"], "test_vit": metadata["ssmpretrain"]}.items():
        said = json.loads(words)
        assert said["encoder"]["name"] == name
        assert said["images"]["size"] == [32, 48]
        assert len(said["sha256"]) == 64
    for path in tmp_path.iterdir():
        for module in (ssmpretrain, timm):
            assert str(Path(module.__file__).parent).encode() not in path.read_bytes()


def test_weights_in_half_precision_are_traced_in_float32_and_stay_as_they_are(tmp_path):
    model = encoder("test_vim", **SMALLEST).bfloat16()
    ssmpretrain.save_encoder(model, tmp_path / "a.pt2", "torch_export")
    assert answer_of(tmp_path / "a.pt2", torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


# Refusals


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_file_that_computes_something_else_is_refused_and_removed(tmp_path, monkeypatch, format):
    class Wrong(torch.nn.Module):
        num_classes = 1000

        def forward(self, images):
            return images.mean(dim=(2, 3)) @ torch.ones(3, 1000)

    program = traced._traced(Wrong(), (3, 160, 160))
    monkeypatch.setattr(traced, "_traced", lambda model, images: program)
    with pytest.raises(
        ValueError, match=r"computes something else than test_vit: .* Nothing was written\. Please report"
    ):
        ssmpretrain.save_encoder(encoder("test_vit"), tmp_path / f"a{SUFFIXES[format]}", format)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_line_that_installs_them(tmp_path, monkeypatch):
    find = traced.importlib.util.find_spec
    monkeypatch.setattr(
        traced.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    with pytest.raises(ValueError, match=r"are not installed\. pip install onnx onnxscript onnxruntime$"):
        ssmpretrain.save_encoder(encoder("test_vit"), tmp_path / "a.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_image_size_belongs_to_a_graph(tmp_path):
    with pytest.raises(
        ValueError, match=r"img_size is an argument of torch_export and onnx only; got 96 for safetensors"
    ):
        ssmpretrain.save_encoder(encoder("test_vit"), tmp_path / "a.safetensors", img_size=96)
    with pytest.raises(ValueError, match=r"must fill the image exactly; got an image of 50 x 50"):
        ssmpretrain.save_encoder(encoder("test_vim"), tmp_path / "a.pt2", "torch_export", img_size=50)
