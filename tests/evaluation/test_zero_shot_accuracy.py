"""Counts of zero-shot classification, by hand and over ranks."""

from typing import Any

import pytest
import torch
from forked_ranks import in_ranks

from ssmpretrain.base import ranks
from ssmpretrain.evaluation.zero_shot_accuracy import ZeroShotAccuracy, number_by_names


def ranked(*orders: tuple[int, ...]) -> torch.Tensor:
    """One row per image: what its classes score, the first named most, those not named least."""
    rows = torch.zeros(len(orders), 7)
    for row, order in zip(rows, orders, strict=True):
        row[list(order)] = torch.arange(len(order), 0, -1).float()
    return rows


def test_accuracies_are_counted_by_hand() -> None:
    accuracy = ZeroShotAccuracy(torch.eye(7), held_out=[5, 6], where="test")
    accuracy.add(ranked((0, 1), (1, 0), (2, 3)), torch.tensor([0, 1, 3]))  # right, right, second
    image = ranked((5, 1), (6, 5), (0, 6), (6, 5, 4, 3, 2, 1), (3, 4))
    accuracy.add(image, torch.tensor([5, 6, 6, 0, -1]))  # right, right, second, last; no label
    found = accuracy.result(lambda counts: counts)
    assert found == {"images": 7, "top1": 4 / 7, "top5": 6 / 7, "held_out": 2 / 3}


def test_without_images_of_held_out_classes_there_is_no_accuracy_of_them() -> None:
    accuracy = ZeroShotAccuracy(torch.eye(7), held_out=[4, 5], where="test")
    accuracy.add(ranked((0,), (1,)), torch.tensor([0, 1]))
    assert accuracy.result(lambda counts: counts) == {"images": 2, "top1": 1.0, "top5": 1.0}


def test_without_labels_there_is_no_accuracy() -> None:
    accuracy = ZeroShotAccuracy(torch.eye(3), where="test")
    accuracy.add(torch.eye(3), torch.full((3,), -1))
    assert accuracy.result(lambda counts: counts) == {}


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    accuracy = ZeroShotAccuracy(torch.eye(3), where="ZeroShot")
    with pytest.raises(ValueError, match="ZeroShot: embeddings are finite numbers"):
        accuracy.add(torch.full((1, 3), float("nan")), torch.zeros(1, dtype=torch.int64))


def of_rank(borders: tuple[int, ...]) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    image, label = torch.randn(50, 8, generator=drawn), torch.randint(-1, 10, (50,), generator=drawn)
    accuracy = ZeroShotAccuracy(torch.randn(8, 10, generator=drawn), held_out=[1, 2], where="test")
    with ranks.joined_ranks():
        mine = slice(borders[ranks.rank()], borders[ranks.rank() + 1])
        accuracy.add(image[mine], label[mine])
        return accuracy.result(lambda counts: torch.stack(ranks.gather(counts)).sum(dim=0))


def test_every_rank_gets_the_accuracy_of_one_process() -> None:
    (alone,) = in_ranks(1, of_rank, (0, 50))
    assert {"top1", "top5", "held_out"} < alone.keys()
    for borders in ((0, 13, 50), (0, 0, 30, 31, 50)):
        assert in_ranks(len(borders) - 1, of_rank, borders) == [alone] * (len(borders) - 1)


class Folders:
    """A data module that names its classes."""

    def __init__(self, *classes: str) -> None:
        self.classes = list(classes)

    def label_by(self, names: list[str], source: str) -> None:
        self.classes = names


@pytest.mark.parametrize(
    ("names", "numbered"),
    [
        (["b", "a"], ["b", "a"]),
        (["x", "b", "a"], ["x", "b", "a"]),
        (["un", "deux"], ["a", "b"]),
        (["a", "deux"], ["a", "b"]),
    ],
)
def test_names_number_the_folders_that_they_name_and_else_follow_their_order(
    names: list[str], numbered: list[str]
) -> None:
    data = Folders("a", "b")
    number_by_names(data, names, where="test")
    assert data.classes == numbered


@pytest.mark.parametrize(
    ("names", "message"), [(["a"], "got 1 names and 2 folders, such as b"), (["b", "deux"], "got b for the folder a")]
)
def test_names_that_contradict_the_folders_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        number_by_names(Folders("a", "b"), names, where="test")
