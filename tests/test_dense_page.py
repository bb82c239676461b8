"""The page about segmentation and detection: its recipes and commands run on small data, from labels to a picture."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ssmpretrain
from ssmpretrain.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "dense.md").read_text()
SMALL = {  # what the page's recipes lack to be small
    "rooms.yaml": "--model.head.channels 8 --data.image_size 32 --data.batch_size 2 --data.num_workers 0",
    "street.yaml": "--model.neck.width 8 --model.detector.box_head.width 8 --model.detector.mask_head.width 8 "
    "--model.detector.mask_head.convs 1 --model.detector.samples 8 --model.detector.proposals.samples 8 "
    "--data.augmentation.short_sides [40] --data.augmentation.longest 64 --data.eval_size [40,64] --data.batch_size 2 "
    "--data.num_workers 0",
}
ENCODER = "--model.init_from null --model.encoder test_vmamba --trainer.accelerator cpu --trainer.precision 32 "
ENCODER += "--trainer.max_epochs 1 --trainer.num_sanity_val_steps 0"


def recipe(name: str) -> str:
    """A recipe of the page, which stands in the block after its name."""
    return re.search(rf"`{name}`:\s+```yaml\n(.*?)```", PAGE, re.DOTALL)[1]


def commands(name: str) -> list[list[str]]:
    """The commands of the page that use a recipe or its run."""
    stem = name.removesuffix(".yaml")
    lines = re.findall(r"^python -m ssmpretrain (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)
    return [shlex.split(line) for line in lines if name in line or f"runs/{stem}" in line]


def run_page(name: str) -> None:
    """Run the commands of a recipe on what is in the working folder."""
    Path(name).write_text(recipe(name))
    words = commands(name)
    assert [word[0] for word in words][:2] == ["fit", "validate"] and len(words) == 3
    for word in words:
        small = shlex.split(f"{ENCODER} {SMALL[name]}") if word[0] == "fit" else []
        assert main([*word, *small]) == 0


def noise(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    Image.fromarray(pixels.numpy()).save(path)


def test_a_folder_of_masks_becomes_pictures_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = re.search(r"```\n(data/rooms.*?)```", PAGE, re.DOTALL)[1]
    names, classes = next(line.split(maxsplit=1) for line in tree.splitlines() if "classes.json" in line)
    for split in ("train", "val"):
        for number in range(2):
            noise(Path(f"data/rooms/images/{split}/{number}.jpg"), number)
            mask = Path(f"data/rooms/masks/{split}/{number}.png")
            mask.parent.mkdir(parents=True, exist_ok=True)
            rows = (torch.arange(40, dtype=torch.uint8) // 14).unsqueeze(1).expand(40, 48).contiguous()
            Image.fromarray(rows.numpy()).save(mask)
    Path(names).write_text(classes)
    run_page("rooms.yaml")
    assert sorted(path.name for path in Path("pictures/pictures").iterdir()) == ["0.png", "1.png"]
    assert len(json.loads(Path("pictures/classes.json").read_text())) == 3


def test_annotations_of_coco_become_pictures_of_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "cyclist"}],
        }
        for number in range(2):
            noise(Path(f"data/street/{split}/{number}.jpg"), number)
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 48})
            corners = [8, 6, 30, 6, 30, 36, 8, 36]
            content["annotations"].append(
                {"id": number + 1, "image_id": number, "category_id": number + 1, "bbox": [8, 6, 22, 30], "area": 660,
                 "iscrowd": 0, "segmentation": [corners]}
            )  # fmt: skip
        Path(f"data/street/{split}.json").write_text(json.dumps(content))
    run_page("street.yaml")
    assert sorted(path.name for path in Path("found/pictures").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize("library", ["torchvision", "segmentation_models_pytorch", "transformers"])
def test_the_encoder_of_a_run_serves_another_library(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    example = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if library in block)
    run = ssmpretrain.save_encoder(
        ssmpretrain.create_encoder("test_vmamba", num_classes=0), tmp_path / "run.safetensors"
    )
    variables: dict[str, Any] = {}
    exec(example.replace("vmamba_tiny_s1l8", "test_vmamba").replace("runs/mae_vmamba_t", str(run.path)), variables)
    model, images = variables["model"].eval(), torch.rand(1, 3, 96, 128)
    if library == "torchvision":
        (found,) = model(images)
        assert found["masks"].shape[1:] == (1, 96, 128)
    else:
        logits = model(images)
        assert getattr(logits, "logits", logits).shape == (1, 3, 96, 128)
