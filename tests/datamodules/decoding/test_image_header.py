"""Headers of images, compared with Pillow and torchvision's decoder."""

import io
import random
import re
import struct
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, check_pixels, decode_rgb
from ssmpretrain.datamodules.decoding.image_header import num_scans, pixel_size
from ssmpretrain.datamodules.faults.bad_samples import BadSample

EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by 90 degrees, which is ignored
PHOTOGRAPHS = [Image.fromarray(photo).resize((61, 43)) for photo in load_sample_images().images]


def jpeg(number: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    PHOTOGRAPHS[number].convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


KINDS = {
    "baseline": jpeg(quality=90),
    "progressive": jpeg(1, progressive=True),
    "grey": jpeg(mode="L"),
    "cmyk": jpeg(mode="CMYK"),
    "full colour": jpeg(1, subsampling=0, optimize=True),
    "restarts": jpeg(restart_marker_rows=1),
    "comment, exif and profile": jpeg(comment=b"\xff" * 999, exif=EXIF, icc_profile=bytes(70_000)),
    "dpi": jpeg(dpi=(300, 300)),
}


def starts(image: bytes) -> list[int]:
    """Return the offset of each segment up to and including the first scan; the first two bytes are not a segment."""
    places, place = [], 2
    while True:
        places.append(place)
        if image[place + 1] == 0xDA:
            return places
        place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")


STRAY = [b"\x00", b"\xff", b"\xff" * 50, b"\x00" * 300, b"stray bytes", b"\xff\x00", b"\xff\x00\xff\xff\x00\x17"]
STRAY += [b"\xff\x01", b"\xff\xd3"]


@pytest.mark.parametrize("kind", KINDS)
def test_stray_bytes_between_segments_change_nothing(kind: str) -> None:
    image, draw = KINDS[kind], random.Random(kind)
    expected, pillow = decode_rgb(image), np.asarray(Image.open(io.BytesIO(image)))
    for _ in range(25):
        parts, last = [], 0
        for place in starts(image)[1:]:
            parts += [image[last:place], draw.choice([b"", *STRAY])]
            last = place
        odd = b"".join([*parts, image[last:]])
        check_pixels(odd, MAX_PIXELS)
        assert pixel_size(odd) == (61, 43)
        assert torch.equal(decode_rgb(odd), expected)
        if not {b"\xff\x01", b"\xff\xd3"} & set(parts):  # which libjpeg passes over and Pillow does not
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(odd))), pillow)


def test_whatever_the_decoder_takes_has_the_size_that_was_read_before() -> None:
    draw, decoded = random.Random(0), 0
    for _ in range(600):
        image = bytearray(draw.choice(list(KINDS.values())))
        head = starts(bytes(image))[-1]
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(2, head)
            if draw.random() < 0.5:
                image[place] = draw.choice([0, 0xFF, 0xC0, 0xC2, 0xD8, 0xDA, 0xE1, draw.randrange(256)])
            elif draw.random() < 0.5:
                image[place:place] = draw.choice(STRAY)
            else:
                del image[place]
        try:
            size = tuple(decode_rgb(bytes(image)).shape[:0:-1])
        except BadSample:
            continue
        decoded += 1
        assert pixel_size(bytes(image)) == size
    assert decoded > 100


@pytest.mark.parametrize(
    "frame", [0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF], ids=hex
)
def test_a_frame_of_any_kind_has_a_size(frame: int) -> None:
    image = bytearray(KINDS["baseline"])
    image[image.index(b"\xff\xc0") + 1] = frame
    assert pixel_size(bytes(image)) == (61, 43)


def test_several_pictures_in_a_file_have_the_size_of_the_first() -> None:
    file = io.BytesIO()
    PHOTOGRAPHS[0].save(file, "MPO", save_all=True, append_images=[PHOTOGRAPHS[1].resize((8, 8))])
    assert pixel_size(file.getvalue()) == (61, 43) and decode_rgb(file.getvalue()).shape == (3, 43, 61)


def test_the_smallest_webp_has_a_size() -> None:
    smallest = b"RIFF\x12\0\0\0WEBPVP8L\x06\0\0\0/\0\0\0\0\0"  # 26 bytes
    assert pixel_size(smallest) == (1, 1)


def scans(count: int, side: int = 16) -> bytes:
    """A progressive image that repeats its last scan."""
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, "JPEG", progressive=True)
    image = file.getvalue()
    last = [found.start() for found in re.finditer(rb"\xff\xda", image)][-1]
    return image[:-2] + image[last:-2] * (count - num_scans(image)) + image[-2:]


def test_scans_are_counted() -> None:
    assert {kind: num_scans(image) for kind, image in KINDS.items()} == {
        **dict.fromkeys(KINDS, 1),
        "progressive": 10,
    }
    assert [num_scans(scans(count)) for count in (6, 16, 17, 500, 3000)] == [6, 16, 17, 500, 3000]
    assert num_scans(jpeg(comment=b"\xff\xda" * 3000)) == num_scans(jpeg() + b"\xff\xda" * 3000) == 1


def test_an_image_of_too_many_scans_is_not_decoded() -> None:
    check_pixels(scans(500), MAX_PIXELS)
    with pytest.raises(BadSample, match=r"images of too many scans.*501 scans of 16 x 16 pixels"):
        check_pixels(scans(501), MAX_PIXELS)
    check_pixels(scans(400), 25 * 256)
    with pytest.raises(BadSample, match=r"images of too many scans.*401 scans of 16 x 16 pixels"):
        check_pixels(scans(401), 25 * 256)


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xd0", b"\xff\xe0\0\0", b"\xff\xda\0\0", b"\xff\0"])
def test_a_header_without_end_costs_no_time(filling: bytes) -> None:
    began = time.process_time()
    with pytest.raises(BadSample, match=r"undecodable images.*without a frame header|more than 65,536 segments"):
        check_pixels(b"\xff\xd8\xff\xe0\0\2" + filling * 2_000_000, MAX_PIXELS)
    assert time.process_time() - began < 1


def test_a_frame_after_the_first_does_not_count() -> None:
    image = KINDS["baseline"]
    frame = image.index(b"\xff\xc0")
    later = image[:frame] + image[frame : frame + 19] + b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 9, 9)
    assert pixel_size(later) == (61, 43)
