"""Nearest images of a few queries among images that pass by in batches; only the nearest are kept.

A bank in `nearest_neighbours` holds the features of all images, which a picture of a few queries does not need. The
rules are the same: cosine similarity in float64, rounded, and of equally near images the earlier one.

Legend: Q queries, B images of a batch, D features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssmpretrain.evaluation.nearest_neighbours import NO_NEIGHBOUR, decode_keys, neighbour_keys, units

T = TypeVar("T")


class Near(NamedTuple, Generic[T]):
    """A neighbour: its cosine similarity to the query in [-1, 1], and the item that came with it."""

    similarity: float
    item: T


class NearestSoFar(Generic[T]):
    """Keep the k images with the largest cosine similarity to each query, and an item for each of them.

    Args:
        queries: Features of the queries, (Q, D).
        k: Number of neighbours of each query, at least 1.

    Attributes:
        seen: Number of images that passed by.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.seen = 0
        self._queries, self._k = units(queries, "cpu"), k
        self._keys = torch.empty(len(queries), 0, dtype=torch.int64)
        self._items: dict[int, T] = {}  # of the images that are among the nearest of a query, by position

    def add(self, features: Tensor, items: Sequence[T], excluded: Tensor) -> None:
        """Compare a batch with the queries.

        Args:
            features: Features of the images, (B, D), on the CPU.
            items: An item for each image, such as its picture.
            excluded: Pairs that do not count, (Q, B), bool, such as a query and itself.
        """
        positions = torch.arange(self.seen, self.seen + len(items))
        keys = neighbour_keys(self._queries @ units(features, "cpu").T, positions)
        keys = torch.cat([self._keys, keys.masked_fill(excluded, NO_NEIGHBOUR)], dim=1)
        self._keys = keys.topk(min(self._k, keys.shape[1]), dim=1).values
        self._items |= dict(zip(positions.tolist(), items, strict=True))
        near = set(decode_keys(self._keys[self._keys > NO_NEIGHBOUR])[1].tolist())
        self._items = {position: item for position, item in self._items.items() if position in near}
        self.seen += len(items)

    def nearest(self) -> list[list[Near[T]]]:
        """Return the neighbours of each query, nearest first; fewer than k if fewer images passed by."""
        return [
            [
                Near(similarity, self._items[position])
                for similarity, position in zip(*map(Tensor.tolist, found), strict=True)
            ]
            for found in (decode_keys(keys[keys > NO_NEIGHBOUR]) for keys in self._keys)
        ]
