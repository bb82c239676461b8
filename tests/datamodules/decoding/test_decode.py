"""Images that are too large, unusual or damaged: they are decoded or counted as bad."""

import io

import pytest
import torch
from damaged import announce, causes, causes_of, encoded, evaluated, shards
from PIL import Image

from ssmpretrain.datamodules.decoding.decode import decode_rgb
from ssmpretrain.datamodules.decoding.image_header import pixel_size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_giant_image_is_not_decoded(make_shards, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    folder = make_shards([9], bad={4: {extension: announce(16_000, 16_000, form)}})
    sizes = []

    def decode(image: bytes) -> torch.Tensor:
        sizes.append(pixel_size(image))
        return decode_rgb(image)

    monkeypatch.setattr("ssmpretrain.datamodules.decoding.decode.decode_rgb", decode)
    data = shards(folder)
    assert evaluated(data) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert causes(data) == {"giant images": 1}
    assert set(sizes) == {(12, 12)}
    assert "16,000 x 16,000 pixels" in data.bad_records()[0]["detail"]


def test_the_limit_of_pixels_can_be_set(make_shards) -> None:
    folder = make_shards([6], bad={2: {"jpg": encoded("JPEG", (40, 25)), "cls": b"1"}})
    assert len(evaluated(shards(folder, max_pixels=1000))) == 6
    assert causes_of(shards(folder, max_pixels=999)) == {"giant images": 1}


@pytest.mark.parametrize(
    "image",
    [
        encoded("JPEG", progressive=True),
        encoded("JPEG", mode="L"),
        encoded("JPEG", mode="CMYK", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        encoded("PNG", mode="P"),
        encoded("PNG", mode="LA"),
        encoded("PNG", mode="I;16"),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", mode="RGBA", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    ],
)
def test_the_size_in_a_header_is_that_of_the_decoded_image_whatever_its_kind(image: bytes) -> None:
    assert pixel_size(image) == (30, 20)
    decoded = decode_rgb(image)
    assert (decoded.shape, decoded.dtype) == ((3, 20, 30), torch.uint8)


def test_a_png_of_16_bits_keeps_its_grey_values() -> None:
    file = io.BytesIO()
    Image.new("I;16", (3, 2), 0x80FF).save(file, "PNG")
    assert decode_rgb(file.getvalue()).unique().tolist() == [0x80]


def test_orientation_in_exif_is_ignored_as_torchvision_and_timm_do() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded("JPEG", exif=exif)).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "0 bytes"),
        (b"<html>403 Forbidden</html>", "a web page"),
        (encoded("GIF"), "a GIF"),
        (encoded("GIF", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")]), "a GIF"),
        (encoded("BMP"), "begin with 'BM"),
        (encoded("JPEG")[:300], "frame header|truncated"),
        (encoded("JPEG")[:-40], "truncated"),
        (encoded("PNG")[:-40], "decode_png|corrupted"),
        (encoded("PNG")[:20], "begin with '.PNG"),
        (b"\xff\xd8\xff\xe0\x00\x00", "frame header"),
    ],
)
def test_what_is_no_whole_image_is_counted_as_undecodable(make_shards, content: bytes, detail: str) -> None:
    import re

    data = shards(make_shards([6], bad={2: {"jpg": content, "cls": b"1"}}))
    assert evaluated(data) == [0, 1, 3, 4, 5]
    assert causes(data) == {"undecodable images": 1}
    assert re.search(detail, data.bad_records()[0]["detail"])
