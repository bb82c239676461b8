"""`reconstruct` from its command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ssmpretrain.datamodules.decoding.named_images import load_images
from ssmpretrain.encoders import create_encoder
from ssmpretrain.objectives.restore import load_objective

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(call: Run, image_folder: Path) -> Run:
    """Exit code, standard output and our own lines of standard error of `reconstruct`."""
    return partial(call, "reconstruct")


def losses(out: str) -> dict[str, str]:
    """File to loss, as printed."""
    return {line.split()[-1]: line.split()[1] for line in out.splitlines() if line.startswith("  loss")}


def test_a_run_folder_and_its_checkpoint_give_one_row_per_image_and_its_loss(run: Run, run_folder: Path) -> None:
    code, out, message = run(run_folder, "images/3.png", "images/0.png")
    assert (code, message) == (0, "")
    assert "reconstruction.png: MAE of test_vim, 2 images of 32 x 32" in out
    assert list(losses(out)) == ["images/3.png", "images/0.png"]
    with Image.open("reconstruction.png") as figure:
        assert round(figure.info["dpi"][0]) == 300
        assert figure.width / figure.height == pytest.approx(5.55 / (0.22 + 2 * 1.35 + 0.05), rel=0.02)
    code, again, _ = run(run_folder / "checkpoints" / "last.ckpt", "images/3.png", "images/0.png", "--out", "b.png")
    assert code == 0 and losses(again) == losses(out)


def test_printed_losses_are_the_objectives_of_images_prepared_as_in_training(run: Run, run_folder: Path) -> None:
    _, out, _ = run(run_folder, "images/3.png", "--seed", "5")
    run_of_mae = load_objective(run_folder)
    objective = run_of_mae.model
    assert run_of_mae.content["images"]["size"] == [32, 32]
    images = load_images([Path("images/3.png")], (32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), where="test")
    with torch.no_grad():
        expected = objective.loss(images, objective.reconstruct(images, torch.Generator().manual_seed(5)))
    assert losses(out) == {"images/3.png": f"{expected:.4f}"}
    _, other, _ = run(run_folder, "images/3.png", "--seed", "6", "--out", "b.png")
    assert losses(other) != losses(out)


def test_a_folder_gives_its_first_eight_images(run: Run, run_folder: Path) -> None:
    code, out, _ = run(run_folder, "images")
    assert code == 0 and list(losses(out)) == [f"images/{number}.png" for number in range(8)]


def test_a_pdf_keeps_its_text_in_truetype(run: Run, run_folder: Path) -> None:
    assert run(run_folder, "images/0.png", "--out", "new/figure.pdf")[0] == 0
    content = Path("new/figure.pdf").read_bytes()
    assert content.startswith(b"%PDF") and b"/Type3" not in content and b"/FontFile2" in content


def test_an_existing_file_is_replaced_only_when_told(run: Run, run_folder: Path) -> None:
    Path("mine.png").write_text("precious")
    code, _, message = run(run_folder, "images/0.png", "--out", "mine.png")
    assert code == 2 and "mine.png exists" in message and "--force" in message
    assert Path("mine.png").read_text() == "precious"
    assert run(run_folder, "images/0.png", "--out", "mine.png", "--force")[0] == 0
    with Image.open("mine.png") as figure:
        figure.verify()
    assert not list(Path().glob(".*"))  # nothing half-written stays


def official_weights() -> list[str]:
    torch.save({"model": create_encoder("test_vim", num_classes=0).state_dict()}, "vim.pth")
    return ["vim.pth", "images/0.png"]


def exported_weights() -> list[str]:
    save_file(create_encoder("test_vim", num_classes=0).state_dict(), "vim.safetensors")
    return ["vim.safetensors", "images/0.png"]


def no_image() -> list[str]:
    Path("images/notes.png").write_text("no image")
    return ["RUN", "images/0.png", "images/notes.png"]


def animation() -> list[str]:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    return ["RUN", "images/0.png", "moving.gif"]


def giant_image() -> list[str]:
    Image.new("1", (12_000, 12_000)).save("giant.png")
    return ["RUN", "images/0.png", "giant.png"]


def endless_file() -> list[str]:
    Path("zero.png").symlink_to("/dev/zero")
    return ["RUN", "zero.png"]


def empty_folder() -> list[str]:
    Path("empty").mkdir()
    return ["RUN", "empty"]


def many_images() -> list[str]:
    return ["RUN", *["images"] * 6]


def words(*given: str) -> Callable[[], list[str]]:
    return lambda: list(given)


MISTAKES: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "missing checkpoint": (words("gone.ckpt", "images"), ["no such file", "gone.ckpt"]),
    "folder that is no run": (words("images", "images"), ["images", "no checkpoint"]),
    "weights without a decoder": (official_weights, ["vim.pth", "no decoder", "last.ckpt"]),
    "exported weights": (exported_weights, ["vim.safetensors", "no decoder", "last.ckpt"]),
    "missing image": (words("RUN", "images/77.png"), ["images/77.png", "10 .png"]),
    "no image": (no_image, ["images/notes.png", "no image"]),
    "animation": (animation, ["moving.gif", "a GIF"]),
    "giant image": (giant_image, ["giant.png", "12,000 x 12,000 pixels"]),
    "endless file": (endless_file, ["zero.png", "Not a regular file"]),
    "empty folder": (empty_folder, ["empty", "no files"]),
    "too many images": (many_images, ["40", "48"]),
    "no images named": (words("RUN"), ["images"]),
    "wrong ending": (words("RUN", "images", "--out", "a.jpg"), ["a.jpg", ".png or .pdf"]),
    "out is a folder": (words("RUN", "images", "--out", "."), [".png or .pdf"]),
    "unwritable out": (words("RUN", "images", "--out", "/proc/figures/a.png"), ["/proc/figures"]),
    "unknown device": (words("RUN", "images", "--device", "warp"), ["--device", "warp"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_short_message_and_exit_code_2(mistake: str, run: Run, run_folder: Path) -> None:
    make, expected = MISTAKES[mistake]
    code, out, message = run(*(str(run_folder) if word == "RUN" else word for word in make()))
    assert (code, out) == (2, "")
    assert message.count("\n") == 0 and len(message) < 500
    for part in expected:
        assert part in message


def test_a_checkpoint_that_does_not_say_how_images_were_prepared_is_refused(run: Run, run_folder: Path) -> None:
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    del content["images"]
    torch.save(content, "own.ckpt")
    code, _, message = run("own.ckpt", "images/0.png")
    assert code == 2 and "own.ckpt" in message and "image_size" in message


def test_weights_that_are_no_numbers_draw_nothing(run: Run, run_folder: Path) -> None:
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["decoder_pred.bias"][:5] = float("nan")
    torch.save(content, "spoiled.ckpt")
    code, _, message = run("spoiled.ckpt", "images/0.png")
    assert code == 2 and not Path("reconstruction.png").exists()
    assert "spoiled.ckpt 5 of" in message and "values of decoder_pred.bias are NaN or infinite" in message
