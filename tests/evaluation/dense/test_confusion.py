"""Scores of segmentation against numbers worked by hand and against torchmetrics."""

import math
from collections.abc import Callable

import pytest
import torch
from forked_ranks import in_ranks
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.evaluation.dense import ConfusionMatrix


def drawn(seed: int, num_classes: int = 4, size: tuple[int, int] = (9, 13)) -> tuple[Tensor, Tensor]:
    """A prediction and a label of one image, with pixels to ignore."""
    noise = torch.Generator().manual_seed(seed)
    predicted, label = torch.randint(num_classes, (2, *size), generator=noise)
    label[torch.rand(size, generator=noise) < 0.2] = 255
    return predicted, label.to(torch.uint8)


def test_absent_and_predicted_only_classes_count_as_published() -> None:
    # Of classes 0 to 4, 3 is nowhere and 4 only predicted; two more pixels are ignored, whatever is predicted there.
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 255, 255], dtype=torch.uint8)
    predicted = torch.tensor([0, 0, 0, 1, 1, 1, 4, 2, 2, 0, 3, 7])
    matrix = ConfusionMatrix(5)
    matrix.update(predicted.view(3, 4), label.view(3, 4))
    scores = matrix.scores()
    # class 0: 3 of 4 found, 4 predicted; class 1: 2 of 3, 3 predicted; class 2: 2 of 3, 2 predicted
    torch.testing.assert_close(
        scores.iou, torch.tensor([3 / 5, 2 / 4, 2 / 3, math.nan, 0.0], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(
        scores.acc, torch.tensor([3 / 4, 2 / 3, 2 / 3, math.nan, math.nan], dtype=torch.float64), equal_nan=True
    )
    assert scores.miou == pytest.approx((3 / 5 + 2 / 4 + 2 / 3 + 0) / 4)
    assert scores.macc == pytest.approx((3 / 4 + 2 / 3 + 2 / 3) / 3)
    assert scores.aacc == pytest.approx(7 / 10)
    assert matrix.counts[2].tolist() == [1, 0, 2, 0, 0]  # rows are labels


def test_score_is_of_the_sum_of_pixels_and_no_mean_over_images() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))  # both images alone: IoU 1
    matrix.update(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))  # and 0
    assert matrix.scores().iou.tolist() == [3 / 4, 0]


@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_miou_agrees_with_torchmetrics(num_classes: int) -> None:
    ours, theirs = ConfusionMatrix(num_classes), MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255)
    for seed in range(3):
        predicted, label = drawn(seed, num_classes)
        label[label == 1] = 0  # class 1 is predicted alone
        ours.update(predicted, label)
        theirs.update(predicted, label.long())
    assert ours.scores().miou == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_labels_of_ade20k_lose_their_zero() -> None:
    raw = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8)  # to ignore, classes 0 to 2, to ignore
    predicted = torch.tensor([2, 0, 1, 1, 0])
    theirs, ours = ConfusionMatrix(3, reduce_zero=True), ConfusionMatrix(3)
    theirs.update(predicted, raw)
    ours.update(predicted, torch.tensor([255, 0, 1, 2, 255]))
    assert torch.equal(theirs.counts, ours.counts) and int(ours.counts.sum()) == 3
    with pytest.raises(DataError, match=r"got 3 at 1 pixels after 1 was subtracted"):
        theirs.update(predicted[:1], torch.tensor([4]))


def part(images: list[list[int]]) -> tuple[list[list[int]], tuple[float, float, float]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    matrix = ConfusionMatrix(4)
    for seed in images[dist.get_rank()]:
        matrix.update(*drawn(seed))
    matrix.reduce().reduce()  # the second has no effect
    return matrix.counts.tolist(), matrix.scores()[:3]


@pytest.mark.parametrize("images", [[[0, 1, 2, 3], [4, 5, 6]], [[0, 1, 2, 3, 4, 5, 6], []]], ids=["4 and 3", "7 and 0"])
def test_ranks_of_unequal_shares_get_the_scores_of_one_process(images: list[list[int]]) -> None:
    alone = ConfusionMatrix(4)
    for seed in range(7):
        alone.update(*drawn(seed))
    expected = (alone.counts.tolist(), alone.scores()[:3])
    assert in_ranks(2, part, images) == [expected, expected]


def forgotten() -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    with pytest.raises(UserError) as error:
        (matrix := ConfusionMatrix(4)).scores()
    matrix.reduce()  # ranks meet: a rank that ends too early takes the rendezvous with it
    return str(error.value)


def test_scores_of_one_rank_alone_are_refused() -> None:
    assert all("Call reduce() on every rank" in message for message in in_ranks(2, forgotten))


def test_without_a_labelled_pixel_the_scores_are_no_numbers() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 255))
    assert all(math.isnan(score) for score in matrix.scores()[:3])


MISTAKES: dict[str, tuple[Callable[[ConfusionMatrix], object], type[UserError], str]] = {
    "label out of range": (
        lambda matrix: matrix.update(torch.zeros(3, dtype=torch.long), torch.tensor([0, 4, 9])),
        DataError,
        "labels are 0 to 3, or 255 for pixels to ignore; got 4, 9 at 2 pixels",
    ),
    "negative label": (
        lambda matrix: matrix.update(torch.zeros(1, dtype=torch.long), torch.tensor([-1])), DataError, "got -1 at 1",
    ),
    "prediction out of range": (
        lambda matrix: matrix.update(torch.tensor([4]), torch.tensor([0])), UserError, "classes are 0 to 3; got 4",
    ),
    "other size": (
        lambda matrix: matrix.update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long()),
        UserError,
        r"\(1, 4, 4\) and \(1, 4, 5\). Resize the logits",
    ),
    "sizes that would broadcast": (
        lambda matrix: matrix.update(torch.zeros(1, 4, 4).long(), torch.zeros(4, 4).long()), UserError, "same size",
    ),
    "logits": (
        lambda matrix: matrix.update(torch.zeros(4, 4), torch.zeros(4, 4).long()), UserError, "Take the argmax",
    ),
    "update after the sum": (
        lambda matrix: matrix.reduce().update(torch.tensor([0]), torch.tensor([0])), UserError, "Count in a new one",
    ),
    "one class": (lambda _: ConfusionMatrix(1), UserError, "at least 2; got 1"),
    "ignored class": (lambda _: ConfusionMatrix(256), UserError, "got 255 for classes 0 to 255"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    act, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        act(ConfusionMatrix(4))
