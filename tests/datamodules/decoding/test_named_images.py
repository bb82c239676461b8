"""Images named on the command line, as evaluation prepares them."""

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.decoding.decode import decode_rgb
from ssmpretrain.datamodules.decoding.named_images import find_named_images, load_images, photograph_crops
from ssmpretrain.datamodules.decoding.transform import ImageTransform
from ssmpretrain.datamodules.faults.bad_samples import BadSample

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


def test_files_and_folders_keep_their_order_and_a_folder_gives_its_first_images(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "b/c/3.png", "a.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [tmp_path / "b", tmp_path / "a.bmp"]
    assert find_named_images(names, 2, where="test") == [tmp_path / "b/1.jpg", tmp_path / "b/2.png", tmp_path / "a.bmp"]
    with pytest.raises(FileNotFoundError, match=r"test: no file or folder .*d\.png; the folder .* holds 1 \.bmp"):
        find_named_images([tmp_path / "d.png"], 2, where="test")


def test_images_are_cropped_in_the_centre_and_normalised(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (20, 4, 40, 20))  # in the middle third, which the crop keeps from edge to edge
    picture.save(tmp_path / "wide.png")
    Image.new("L", (5, 5), 255).save(tmp_path / "grey.png")
    images = load_images([tmp_path / "wide.png", tmp_path / "grey.png"], (20, 20), MEAN, STD, where="test")
    assert images.shape == (2, 3, 20, 20) and images.dtype == torch.float32
    white, black = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([-1.0, -1.0, 0.0])
    for row, column, expected in ((10, 0, white), (10, 19, white), (19, 10, white), (0, 10, black), (3, 10, black)):
        assert torch.allclose(images[0, :, row, column], expected)
    assert torch.allclose(images[1], white.view(3, 1, 1).expand(3, 20, 20), atol=1e-5)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(DataError, match=r"test: .*page\.png is no image that can be read"):
        load_images([tmp_path / "page.png"], (20, 20), MEAN, STD, where="test")


def test_images_are_judged_as_data_are(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (12_000, 12_000)).save(tmp_path / "giant.png")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    for name, problem in (
        ("moving.gif", r"not a JPEG, PNG or WebP image but a GIF\)\. Leave it out, or convert it"),
        ("giant.png", r"giant images \(12,000 x 12,000 pixels\)"),
        ("pipe.png", "cannot be read: Not a regular file"),
        ("/dev/zero", "cannot be read: Not a regular file"),
        ("gone.png", "cannot be read: No such file or directory"),
    ):
        with pytest.raises(DataError, match=rf"test: .*{name} .*{problem}"):
            load_images([tmp_path / "good.png", tmp_path / name], (20, 20), MEAN, STD, where="test")


def test_an_animation_is_never_decoded_to_its_frames() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadSample, match="2 frames, where one is needed"):
        decode_rgb(file.getvalue())


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 9), (1, 8, 8)])
def test_a_batch_of_other_shapes_is_refused(shape: tuple[int, ...]) -> None:
    batcher = Batcher(ImageTransform((8, 8), None, False, 1.0), MEAN, STD, seed=0)
    samples = [
        {"image": torch.zeros(size, dtype=torch.uint8), "label": -1, "key": "", "seed": 0}
        for size in ((3, 8, 8), shape)
    ]
    with pytest.raises(DataError, match=r"batch: images have 3 channels and one height and width; got .*\(3, 8, 8\)"):
        batcher.collate(samples)


def test_crops_of_photographs_differ_and_repeat() -> None:
    first, again = (photograph_crops(4, (16, 24), MEAN, STD) for _ in range(2))
    assert first.shape == (4, 3, 16, 24) and torch.equal(first, again)
    assert len({tuple(crop.flatten().tolist()) for crop in first}) == 4
    assert not torch.equal(first, photograph_crops(4, (16, 24), MEAN, STD, seed=1))
    pixels = first * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert 0 <= pixels.min() < 0.2 and 0.8 < pixels.max() <= 1.001
