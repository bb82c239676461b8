"""Run-length codes and polygons, compared with pycocotools."""

import numpy as np
import pytest

from ssmpretrain.datamodules.targets.polygons import encode_polygons
from ssmpretrain.datamodules.targets.run_lengths import decode_mask, decode_runs, encode_mask, encode_runs

tools = pytest.importorskip("pycocotools.mask")


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = [np.zeros((7, 5), bool), np.ones((7, 5), bool), np.eye(6, dtype=bool), np.ones((1, 1), bool)]
    for number in range(200):
        h, w = rng.integers(1, 60, 2)
        noise = rng.random((h, w)) < rng.random()
        blocks = (rng.random((h // 7 + 1, w // 7 + 1)) < 0.5).repeat(7, 0).repeat(7, 1)[:h, :w]
        found.append(noise if number % 2 else blocks)
    big = np.zeros((2000, 3000), bool)
    big[500:1900, 1000:] = True
    return [*found, big]


def test_codes_are_those_of_pycocotools() -> None:
    for mask in masks():
        code = encode_mask(mask)
        expected = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert code == {"size": list(mask.shape), "counts": expected["counts"].decode()}
        assert (decode_mask(code) == mask).all()


def test_runs_by_hand() -> None:
    code = encode_runs([2, 1, 1, 3, 5], 3, 4)  # columns 0 0 1 | 0 1 1 | 1 0 0 | 0 0 0
    assert decode_runs(code).tolist() == [2, 1, 1, 3, 5]
    assert decode_mask(code).astype(int).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ("", "have 0 pixels instead of 12"),
        ("9", "have 9 pixels instead of 12"),
        ("P", "cut off"),
        ("\u00e9", "a character that no code has|pixels instead"),
        (" ", "a character that no code has"),
        ("oooooooooooooooooooo0", "a number that no image can have"),
        ("L<", "negative|pixels instead"),
    ],
)
def test_a_broken_code_says_why(counts: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_runs({"size": [3, 4], "counts": counts})


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        h, w = (int(side) for side in rng.integers(5, 80, 2))
        polygons = [
            (rng.random(2 * int(rng.integers(3, 9))) * max(h, w) * 1.2).tolist() for _ in range(rng.integers(1, 4))
        ]
        expected = tools.merge(tools.frPyObjects(polygons, h, w))
        assert encode_polygons(polygons, h, w) == {"size": [h, w], "counts": expected["counts"].decode()}


def test_a_square_of_whole_corners_covers_its_pixels() -> None:
    mask = decode_mask(encode_polygons([[2, 1, 5, 1, 5, 3, 2, 3]], 4, 6))
    assert mask.astype(int).tolist() == [[0] * 6, [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0] * 6]
