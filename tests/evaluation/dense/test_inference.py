"""Sliding windows, scales and mirror images with models whose answer at each pixel is known."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.dense import Inference, inference, predict, predict_classes
from ssmpretrain.evaluation.dense.inference import windows

SLIDE = Inference(slide=True, window=(8, 10), stride=(5, 6))


def pointwise(images: Tensor) -> Tensor:
    """Logits of 4 classes from the colour of each pixel alone."""
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, -1, 1]])
    return torch.einsum("kc,bchw->bkhw", weight.to(images), images)


def positional(images: Tensor) -> Tensor:
    """Logits that depend on the column in the window, and not on the image."""
    column = torch.arange(images.shape[-1], dtype=torch.float32).expand(1, 1, *images.shape[-2:])
    return torch.cat([column, torch.zeros_like(column)], dim=1)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 683), [(0, 0), (0, 171)]), ((512, 2048), [(0, 341 * n) for n in range(5)] + [(0, 1536)])],
)
def test_windows_are_the_published_ones(size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    found = list(windows(size, (512, 512), (341, 341)))
    assert [(rows.start, columns.start) for rows, columns in found] == expected
    assert all(columns.stop - columns.start == 512 for _, columns in found)


@pytest.mark.parametrize("size", [(8, 10), (9, 11), (13, 16), (14, 17), (3, 40), (40, 3), (1, 1), (31, 29)])
def test_windows_cover_each_pixel_and_lie_inside(size: tuple[int, int]) -> None:
    covered = torch.zeros(size, dtype=torch.int64)
    shapes = set()
    for rows, columns in windows(size, SLIDE.window, SLIDE.stride):
        assert rows.start >= 0 and rows.stop <= size[0] and columns.start >= 0 and columns.stop <= size[1]
        shapes.add((rows.stop - rows.start, columns.stop - columns.start))
        covered[rows, columns] += 1
    assert covered.min() >= 1 and shapes == {(min(8, size[0]), min(10, size[1]))}


@pytest.mark.parametrize("size", [(8, 10), (17, 23), (5, 40), (3, 4)])
def test_windows_of_a_pointwise_model_give_the_whole_image(size: tuple[int, int]) -> None:
    picture = image(*size)
    expected = pointwise(picture)[0].softmax(0)
    for settings in (Inference(), SLIDE, Inference(flip=True), Inference(slide=True, window=(8, 8), stride=(8, 8))):
        torch.testing.assert_close(predict(pointwise, picture, settings), expected)


def test_pixels_of_several_windows_get_the_mean_of_their_logits() -> None:
    # Windows of 4 columns begin at 0, 3 and 4, so column 4 is column 4 - 3 = 1 and 0 of its windows.
    found = predict(positional, image(4, 8), Inference(slide=True, window=(4, 4), stride=(3, 3)))
    mean = torch.tensor([0, 1, 2, (3 + 0) / 2, (1 + 0) / 2, (2 + 1) / 2, (3 + 2) / 2, 3])
    torch.testing.assert_close(found[0, 0], torch.sigmoid(mean))


def test_flip_averages_probabilities_of_the_image_and_its_mirror_image() -> None:
    column = torch.arange(6.0)
    expected = (torch.sigmoid(column) + torch.sigmoid(column.flip(0))) / 2
    torch.testing.assert_close(predict(positional, image(2, 6), Inference(flip=True))[0, 1], expected)


def test_scales_average_probabilities_and_no_logits() -> None:
    picture, sizes = image(12, 18), []

    def noted(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[-2:]))
        return pointwise(images)

    found = predict(noted, picture, Inference(scales=(0.5, 1, 1.75), flip=True))
    assert sizes == [(6, 9)] * 2 + [(12, 18)] * 2 + [(21, 32)] * 2  # 18 * 1.75 is rounded up
    expected = torch.zeros(4, 12, 18)
    for size in ((6, 9), (12, 18), (21, 32)):
        scaled = F.interpolate(picture, size, mode="bilinear", align_corners=False)
        for mirrored in (scaled, scaled.flip(-1)):
            logits = pointwise(mirrored)
            logits = logits if mirrored is scaled else logits.flip(-1)
            expected += F.interpolate(logits, (12, 18), mode="bilinear", align_corners=False)[0].softmax(0) / 6
    torch.testing.assert_close(found, expected)


def test_logits_are_resized_to_the_file_before_the_softmax() -> None:
    picture = image(8, 12)
    found = predict(pointwise, picture, size=(21, 30))
    expected = F.interpolate(pointwise(picture), (21, 30), mode="bilinear", align_corners=False)[0].softmax(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(21, 30), (5, 7), (17, 90), (17, 23), None])
def test_classes_are_the_likeliest_of_the_probabilities(
    size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_STRIP", 4 * 30 * 3)  # strips of a few rows
    picture, settings = (
        image(17, 23),
        Inference(slide=True, window=(8, 10), stride=(5, 6), scales=(0.75, 1.5), flip=True),
    )
    probabilities = predict(pointwise, picture, settings, size)
    assert torch.equal(predict_classes(pointwise, picture, settings, size), probabilities.argmax(0))


def test_probabilities_are_float32_and_sum_to_one() -> None:
    settings = Inference(slide=True, window=(8, 10), stride=(5, 6), scales=(0.75, 1.5), flip=True)
    found = predict(lambda images: pointwise(images).bfloat16(), image(17, 23), settings)
    assert found.dtype == torch.float32 and found.shape == (4, 17, 23)
    torch.testing.assert_close(found.sum(0), torch.ones(17, 23))


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "several images": (pointwise, {"image": torch.zeros(2, 3, 8, 8)}, r"one by one"),
    "no batch axis": (pointwise, {"image": torch.zeros(3, 8, 8)}, r"\(1, 3, H, W\); got \(3, 8, 8\)"),
    "logits of another size": (lambda images: pointwise(images)[..., ::4, ::4], {}, r"\(1, 4, 2, 2\). Resize them"),
    "one class": (lambda images: pointwise(images)[:, :1], {}, "at least 2 classes"),
    "logits that are no numbers": (lambda images: pointwise(images) / 0, {}, "finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    model, change, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        predict(model, **{"image": torch.zeros(1, 3, 8, 8), **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (8, 8), "stride": (9, 8)}, "1 <= stride <= window"),
        ({"window": (8, 8), "stride": (0, 8)}, "341 and 512 are usual"),
        ({"window": (8,), "stride": (8, 8)}, "height, width"),
        ({"scales": ()}, "ratios above 0"),
        ({"scales": (1.0, 0.0)}, "ratios above 0"),
        ({"scales": (float("nan"),)}, "ratios above 0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Inference(**settings)
