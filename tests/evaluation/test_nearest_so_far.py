"""Neighbours among images that pass by in batches, against a search among all of them at once."""

import pytest
import torch

from ssmpretrain.evaluation.nearest_neighbours import Bank, find_neighbours
from ssmpretrain.evaluation.nearest_so_far import NearestSoFar


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_give_the_neighbours_of_a_bank(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(100, 6, generator=generator), torch.randn(5, 6, generator=generator)
    bank[50:60] = 2 * bank[20:30]  # equally near: the earlier one counts
    expected = find_neighbours(Bank.of(bank, torch.zeros(100)), queries, 9)
    nearest = NearestSoFar[int](queries, 9)
    for start in range(0, 100, batch):
        features = bank[start : start + batch]
        nearest.add(features, range(start, start + len(features)), torch.zeros(5, len(features), dtype=torch.bool))
        assert len(nearest._items) <= 45
    found = nearest.nearest()
    assert [[near.item for near in row] for row in found] == expected.position.tolist()
    assert [[near.similarity for near in row] for row in found] == expected.similarity.tolist()
    assert nearest.seen == 100


def test_excluded_pairs_do_not_count() -> None:
    features = torch.eye(3)
    nearest = NearestSoFar[str](features, 3)
    nearest.add(features, "abc", torch.eye(3, dtype=torch.bool))
    assert [[near.item for near in row] for row in nearest.nearest()] == [["b", "c"], ["a", "c"], ["a", "b"]]
