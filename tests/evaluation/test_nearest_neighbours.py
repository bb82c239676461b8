"""Neighbours and their votes against NumPy, one by one, and against scikit-learn."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ssmpretrain.evaluation import nearest_neighbours
from ssmpretrain.evaluation.few_shot import draw_shots
from ssmpretrain.evaluation.nearest_neighbours import Bank, count_hits, find_neighbours, find_neighbours_over_ranks


def blobs(seed: int, count: int, classes: int = 7) -> tuple[Tensor, Tensor]:
    centres = 2 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 3 * torch.randn(count, 8, generator=generator), labels


BANK, BANK_LABELS = blobs(0, 150)
QUERIES, LABELS = blobs(1, 60)


def by_hand(k: int, temperature: float) -> tuple[list[list[int]], list[int], int]:
    """Neighbours of each query, predictions, and how often the label is among the first five, in NumPy and a loop."""
    bank, labels = BANK.double().numpy(), BANK_LABELS.numpy()
    neighbours, predicted, among_five = [], [], 0
    for query, truth in zip(QUERIES.double().numpy(), LABELS.tolist(), strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-similarity)[:k]
        votes = {int(label): 0.0 for label in labels[nearest]}
        for image in nearest:
            votes[int(labels[image])] += float(np.exp(similarity[image] / temperature))
        order = sorted(votes, key=lambda label: -votes[label])
        neighbours.append(nearest.tolist())
        predicted.append(order[0])
        among_five += truth in order[:5]
    return neighbours, predicted, among_five


@pytest.mark.parametrize("k", [1, 5, 20, 149])
@pytest.mark.parametrize("temperature", [0.03, 0.07, 1.0])
def test_neighbours_and_votes_agree_with_a_loop_and_with_scikit_learn(k: int, temperature: float) -> None:
    neighbours, predicted, among_five = by_hand(k, temperature)
    found = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, k)
    assert found.position.tolist() == neighbours
    correct = int((np.array(predicted) == LABELS.numpy()).sum())
    assert count_hits(found, LABELS, [k], temperature)[k].tolist() == [correct, among_five]
    learner = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    learner.fit(BANK.double().numpy(), BANK_LABELS.numpy())
    assert learner.predict(QUERIES.double().numpy()).tolist() == predicted
    assert 10 < correct < 55  # neither trivial nor hopeless


def test_several_k_from_one_search_are_each_as_alone() -> None:
    found = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 50)
    together = count_hits(found, LABELS, [50, 1, 10], 0.07)
    for k, hits in together.items():
        alone = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, k)
        assert torch.equal(hits, count_hits(alone, LABELS, [k], 0.07)[k])


def test_more_neighbours_than_the_bank_has_are_all_it_has() -> None:
    found = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 1000)
    assert found.label.shape == (60, 150)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 30)
    monkeypatch.setattr(nearest_neighbours, "_BANK_CHUNK", 7)
    monkeypatch.setattr(nearest_neighbours, "_QUERY_CHUNK", 11)
    cut = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 30)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    assert torch.equal(count_hits(whole, LABELS, [30], 0.07)[30], count_hits(cut, LABELS, [30], 0.07)[30])


def test_of_equal_images_the_earlier_is_nearer_wherever_the_bank_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = torch.cat([BANK, 4 * BANK])  # cosine similarity does not see the length
    for chunk in (8192, 13):
        monkeypatch.setattr(nearest_neighbours, "_BANK_CHUNK", chunk)
        found = find_neighbours(Bank.of(twice, torch.cat([BANK_LABELS, BANK_LABELS])), QUERIES, 20)
        assert torch.equal(found.position[:, 1::2], found.position[:, ::2] + 150)
        assert torch.equal(found.similarity[:, 1::2], found.similarity[:, ::2])


def test_equal_votes_go_to_the_lower_label() -> None:
    bank, query = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    for labels in ([4, 9], [9, 4]):
        found = find_neighbours(Bank.of(bank, torch.tensor(labels)), query, 2)
        assert count_hits(found, torch.tensor([4]), [2], 0.07)[2].tolist() == [1, 1]
        assert count_hits(found, torch.tensor([9]), [2], 0.07)[2].tolist() == [0, 1]


def test_a_class_that_got_no_vote_is_not_among_the_first_five() -> None:
    found = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 1)
    hits = count_hits(found, LABELS, [1], 0.07)[1]
    assert hits[0] == hits[1]
    assert count_hits(found, torch.full((60,), 77), [1], 0.07)[1].tolist() == [0, 0]


def test_a_low_temperature_does_not_overflow() -> None:
    found = find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 20)
    nearest_alone = count_hits(find_neighbours(Bank.of(BANK, BANK_LABELS), QUERIES, 1), LABELS, [1], 1.0)[1]
    assert count_hits(found, LABELS, [20], 1e-6)[20][0] == nearest_alone[0]


def test_parts_of_a_bank_find_together_what_the_whole_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the work of two ranks, one after the other: rank 0 of the search gets the keys of both."""
    bank = Bank.of(BANK, BANK_LABELS)
    parts = [Bank(BANK[rows], torch.arange(150)[rows], BANK_LABELS, 150) for rows in (slice(0, 6), slice(6, 150))]
    keys = [nearest_neighbours._nearest(part, QUERIES, 40, "cpu") for part in parts]

    def gathered(rows: Tensor, target: int) -> list[Tensor]:
        return [torch.nn.functional.pad(part, (0, 40 - part.shape[1]), value=-(2**63)) for part in keys]

    monkeypatch.setattr(nearest_neighbours.ranks, "gather_rows", gathered)
    together = find_neighbours_over_ranks(bank, QUERIES, 40)
    whole = find_neighbours(bank, QUERIES, 40)
    assert all(torch.equal(one, other) for one, other in zip(whole, together, strict=True))


def test_chosen_images_are_a_bank_of_their_own() -> None:
    positions = torch.tensor([3, 70, 71, 149])
    few = Bank.of(BANK, BANK_LABELS).chosen(positions)
    found = find_neighbours(few, QUERIES, 3)
    alone = find_neighbours(Bank.of(BANK[positions], BANK_LABELS[positions]), QUERIES, 3)
    assert few.size == 4 and torch.equal(found.position, positions[alone.position])
    assert torch.equal(found.label, alone.label)


def test_a_bank_too_large_for_its_positions_is_refused() -> None:
    labels: Any = range(2**26 + 1)
    with pytest.raises(ValueError, match="67,108,863 images at most"):
        Bank(BANK, torch.arange(150), labels, 2**26 + 1)


def test_shots_are_drawn_from_every_class_by_seed_and_fewer_are_among_more() -> None:
    one, three = draw_shots(BANK_LABELS, 1, seed=5), draw_shots(BANK_LABELS, 3, seed=5)
    assert torch.bincount(BANK_LABELS[three]).tolist() == [3] * 7
    assert torch.bincount(BANK_LABELS[one]).tolist() == [1] * 7
    assert set(one.tolist()) < set(three.tolist()) and three.tolist() == sorted(three.tolist())
    assert three.tolist() == draw_shots(BANK_LABELS, 3, seed=5).tolist() != draw_shots(BANK_LABELS, 3, seed=6).tolist()


def test_a_class_with_fewer_images_gives_all_it_has() -> None:
    labels = torch.tensor([8, 2, 8, 8, 2, 5])
    assert torch.bincount(labels[draw_shots(labels, 2, seed=0)]).tolist() == [0, 0, 2, 0, 0, 1, 0, 0, 2]
    assert draw_shots(labels, 9, seed=0).tolist() == list(range(6))
