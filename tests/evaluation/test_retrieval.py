"""Recall at k by hand, against a plain loop, and over ranks."""

import math
from typing import Any

import pytest
import torch
from forked_ranks import in_ranks
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.evaluation.retrieval import Retrieval, recall


def directions(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def by_hand(image: Tensor, text: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """Recall at k of both ways, query by query, where no two similarities are equal."""
    similarity = torch.nn.functional.normalize(image.double()) @ torch.nn.functional.normalize(text.double()).T
    found = [bool((owner[row.argsort(descending=True)[:k]] == number).any()) for number, row in enumerate(similarity)]
    back = [bool(owner[number] in column.argsort(descending=True)[:k]) for number, column in enumerate(similarity.T)]
    return sum(found) / len(found), sum(back) / len(back)


def noise(images: int, texts: int, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=drawn)]).sort().values
    image = torch.randn(images, 8, generator=drawn)
    text = image[owner] + spread * torch.randn(texts, 8, generator=drawn)
    return image, text, owner


def test_recall_of_three_images_worked_by_hand() -> None:
    image, text = directions(0, 90, 180), directions(40, 50, 170)  # captions 0 and 1 lie between images 0 and 1
    found = recall(image, text, torch.tensor([1, 0, 2]), ks=(1, 2, 3))  # and belong to the farther one
    assert found == {
        "i2t_r1": 1 / 3, "i2t_r2": 1.0, "i2t_r3": 1.0, "t2i_r1": 1 / 3, "t2i_r2": 1.0, "t2i_r3": 1.0,
    }  # fmt: skip


def test_an_image_has_found_its_text_with_any_of_its_captions() -> None:
    image, text = directions(0, 90), directions(1, 89, 120)  # two captions of image 0, one of them far away
    found = recall(image, text, torch.tensor([0, 0, 1]), ks=(1, 2))
    assert found["i2t_r1"] == 0.5 and found["i2t_r2"] == 1.0  # image 1 is nearer to the second caption of image 0
    assert found["t2i_r1"] == 2 / 3  # that caption finds image 1


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_a_plain_loop_over_sorted_similarities(seed: int) -> None:
    image, text, owner = noise(40, 130, seed)
    found = recall(image, text, owner)
    for k in (1, 5, 10):
        assert (found[f"i2t_r{k}"], found[f"t2i_r{k}"]) == by_hand(image, text, owner, k)
    assert 0 < found["t2i_r1"] < found["t2i_r5"] < 1


def test_chunks_of_queries_and_gallery_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = noise(40, 130)
    whole = recall(*pairs)
    monkeypatch.setattr("ssmpretrain.evaluation.retrieval._GALLERY_CHUNK", 7)
    monkeypatch.setattr("ssmpretrain.evaluation.retrieval._QUERY_CHUNK", 9)
    assert recall(*pairs) == whole


def test_a_collapsed_model_finds_nothing() -> None:
    image, text = torch.randn(1, 8).expand(20, 8), torch.randn(1, 8).expand(40, 8)
    found = recall(image, text, torch.arange(20).repeat_interleave(2))
    assert set(found.values()) == {0.0}


def test_what_is_as_similar_as_the_right_one_comes_before_it() -> None:
    image, text = directions(0, 0, 90), directions(10, 5, 80)  # two images are one
    found = recall(image, text, torch.arange(3), ks=(1, 2))
    assert found["t2i_r1"] == 1 / 3 and found["t2i_r2"] == 1.0


def test_fewer_in_the_gallery_than_k_are_all_found_unless_equal() -> None:
    found = recall(directions(0, 90), directions(1, 91), torch.arange(2))
    assert set(found.values()) == {1.0}


def test_images_without_a_caption_take_no_part() -> None:
    image, text, owner = noise(30, 60)
    kept = Retrieval(8)
    with_others = torch.cat([image[:10], text[:5], image[10:]])  # five that would be found before the right ones
    kept.add(with_others, text, torch.where(owner < 10, owner, owner + 5))
    assert kept.result() == recall(image, text, owner) and kept.num_images() == 30


def test_batches_give_what_all_at_once_gives() -> None:
    image, text, owner = noise(30, 60)
    kept = Retrieval(8)
    for start in range(0, 30, 7):
        own = (owner >= start) & (owner < start + 7)
        kept.add(image[start : start + 7].bfloat16().float(), text[own], owner[own] - start)
    assert kept.result() == recall(image.bfloat16().float(), text, owner)


def test_nothing_to_retrieve_gives_no_numbers() -> None:
    kept = Retrieval(8)
    kept.add(torch.randn(3, 8), torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    assert kept.result() == {}


def test_embeddings_that_are_not_finite_are_an_error_that_counts_them() -> None:
    image, text, owner = noise(30, 60)
    image[3, 2], text[5:7] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="finite numbers; those of 1 images and 2 captions are not"):
        recall(image, text, owner)


def of_rank(shares: tuple[float, ...], broken: int | None = None) -> Any:
    """Recall of the same pairs, of which each rank has a share."""
    torch.set_num_threads(1)
    image, text, owner = noise(41, 300, spread=4.0)
    image[30] = image[3]  # a tie over ranks
    borders = [0, *(round(41 * sum(shares[: number + 1])) for number in range(len(shares)))]
    with ranks.joined_ranks():
        first, last = borders[ranks.rank()], borders[ranks.rank() + 1]
        own = (owner >= first) & (owner < last)
        part = image[first:last]
        if ranks.rank() == broken:
            part = part * float("nan")
        kept = Retrieval(8)
        for number in range(len(part)):
            mine = own & (owner == first + number)
            kept.add(part[number : number + 1], text[mine], torch.zeros(int(mine.sum()), dtype=torch.int64))
        try:
            return kept.result(), kept.num_images()
        except ValueError as error:
            return str(error)


def test_every_rank_gets_the_numbers_of_one_process_whatever_its_share() -> None:
    (alone,) = in_ranks(1, of_rank, (1.0,))
    assert alone[1] == 41 and 0 < alone[0]["t2i_r1"] < 1
    for shares in ((0.5, 0.5), (1.0, 0.0), (0.4, 0.1, 0.0, 0.5)):
        assert in_ranks(len(shares), of_rank, shares) == [alone] * len(shares)


def test_all_ranks_stop_where_one_has_embeddings_that_are_not_finite() -> None:
    first, second = in_ranks(2, of_rank, (0.5, 0.5), broken=1)
    assert first == second and "those of 21 images" in first
