"""The page about importing the encoder: its example runs, elsewhere, on what a run leaves."""

import re
from pathlib import Path

import pytest
import torch
from bare_environment import bare_process
from PIL import Image

import ssmpretrain

ROOT = Path(ssmpretrain.__file__).parents[1]
PAGE = (ROOT / "docs" / "import.md").read_text()

# A process that finds no more packages than torch, torchvision and timm bring.
MISSING = ["lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "jsonargparse", "sklearn", "scipy"]
MISSING += ["matplotlib", "webdataset", "open_clip", "onnx", "onnxscript", "onnxruntime"]


def bare(script: Path, *words: object) -> str:
    """Run a script as in a bare environment, in its own folder, and return what it prints."""
    done = bare_process(MISSING, str(script), *words, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run."""
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder("test_vim", num_classes=0, img_size=32)
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    images = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    content = {"state_dict": state, "encoder": {"name": "test_vim", "args": {"img_size": 32}}, "images": images}
    torch.save(content, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


def test_the_example_finds_the_likest_image_in_a_bare_environment(run, tmp_path):
    script = tmp_path / "retrieve.py"
    script.write_text(re.search(r"```python\n(import sys.*?)```", PAGE, re.DOTALL)[1])
    noise = torch.Generator().manual_seed(0)
    query = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=noise)
    pictures = {"query": query, "near": query.clone(), "flat": torch.zeros_like(query)}
    pictures["near"][:4] = 128
    for name, pixels in pictures.items():
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    assert len(script.read_text().strip().splitlines()) < 30
    lines = bare(script, run, *(f"{name}.png" for name in ("query", "flat", "near"))).splitlines()
    assert [line.split()[1] for line in lines] == ["near.png", "flat.png"]


def test_every_kind_of_file_loads_in_a_bare_environment(run, tmp_path):
    model = ssmpretrain.load_encoder(run)
    files = [run]
    files += [ssmpretrain.save_encoder(model, tmp_path / "a.safetensors").path]
    files += [ssmpretrain.save_encoder(model, tmp_path / "folder", "timm").path]
    files += [ssmpretrain.save_encoder(model, tmp_path / "a.pth", "official").path]
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, ssmpretrain, torch\n"
        "for path in sys.argv[1:]:\n"
        "    model = ssmpretrain.load_encoder(path, img_size=64)\n"
        "    maps = ssmpretrain.load_encoder(path, features_only=True, out_indices=[1, 3])\n"
        "    sides = [one.shape[-1] for one in maps(torch.ones(1, 3, 32, 32))]\n"
        "    print(*model(torch.ones(1, 3, 64, 64)).shape, *sides)\n"
    )
    assert bare(script, *files).splitlines() == ["1 32 2 2"] * len(files)


def test_the_page_names_every_format():
    from ssmpretrain.encoders.weights.formats import FORMATS

    assert [row for row in FORMATS if f"| `{row}` |" not in PAGE] == []


def block(start: str, weights: Path, **changes: str) -> dict:
    """Run the block of Python on the page that starts with a line, with a file of weights; return its variables."""
    code = next(one for one in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if one.startswith(start))
    for old, new in {'"runs/mae_vmamba_t"': repr(str(weights)), "vmamba_tiny_s1l8": "test_vmamba", **changes}.items():
        code = code.replace(old, new)
    variables: dict = {}
    exec(code, variables)
    return variables


@pytest.fixture
def vmamba(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return ssmpretrain.save_encoder(ssmpretrain.create_encoder("test_vmamba"), tmp_path / "vmamba.safetensors").path


def test_the_example_of_taps_prints_maps_of_an_odd_size(vmamba, capsys):
    block("import ssmpretrain\nimport torch\nfrom ssmpretrain.encoders.features", vmamba)
    assert capsys.readouterr().out.startswith("[16, 32, 64, 128] [4, 8, 16, 32] [(1, 16, 94, 125), (1, 32, 47, 63)")


def test_torchvisions_detector_trains_on_the_example_backbone(vmamba):
    small = {"out_channels=256": "out_channels=8", "num_classes=91": "num_classes=3, min_size=64"}
    model = block("from collections", vmamba, **small)["model"]
    target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 80, dtype=torch.uint8)
    losses = model([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_segmentation_models_pytorch_reads_our_encoder(vmamba):
    pytest.importorskip("segmentation_models_pytorch")
    variables = block("import segmentation_models_pytorch", vmamba)
    maps = variables["model"].eval().encoder(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(maps[-4:], variables["maps"].eval()(maps[0]))


def test_transformers_reads_our_encoder(vmamba):
    pytest.importorskip("transformers")
    variables = block("import ssmpretrain\nfrom transformers", vmamba)
    images = torch.randn(1, 3, 64, 64)
    maps = variables["backbone"].eval()(images).feature_maps
    torch.testing.assert_close(list(maps), variables["maps"].eval()(images))
