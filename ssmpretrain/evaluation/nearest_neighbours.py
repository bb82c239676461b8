"""Nearest neighbours of images among labelled images, and the accuracy of their vote.

The search is exact, and gives the same neighbours on one process and on many: the result depends only on the features,
not on the division of the bank. Similarities are computed in float64 and rounded to multiples of 2**-36, which is far
coarser than the error of the computation. So equal images are equally near, and of equally near images the earlier one
in the bank is taken.

Legend: N bank images, n of them on this rank, M query images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError

_BANK_CHUNK, _QUERY_CHUNK = 8192, 1024  # 128 MiB of similarities and keys at a time
_POSITION_BITS, _LEVELS = 26, 2**36
_LAST_POSITION = 2**_POSITION_BITS - 1
NO_NEIGHBOUR = torch.iinfo(torch.int64).min  # key of a pair that does not count


@dataclass(frozen=True)
class Bank:
    """Labelled images in which neighbours are searched; with several ranks, the part of this rank.

    Attributes:
        features: Features (n, D).
        positions: Positions of these images in the whole bank, (n,), int64.
        labels: Labels of the whole bank, int64. A bank made by `chosen` keeps all of them.
        size: N, number of images that can be found, over all ranks.
    """

    features: Tensor
    positions: Tensor
    labels: Tensor
    size: int

    def __post_init__(self) -> None:
        if len(self.labels) > _LAST_POSITION:
            raise UserError(
                f"nearest neighbours: a bank has {_LAST_POSITION:,} images at most; got {len(self.labels):,}. Limit it."
            )

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Bank:
        """Make a bank from the images of this process: features (N, D) and labels (N,)."""
        return cls(features, torch.arange(len(labels)), labels, len(labels))

    @classmethod
    def over_ranks(cls, features: Tensor, labels: Tensor) -> Bank:
        """Make a bank from the images of all ranks. Each rank passes and keeps its own: (n, D) and (n,)."""
        parts = ranks.gather(labels)
        first = sum(len(part) for part in parts[: ranks.rank()])
        every = torch.cat(parts)
        return cls(features, torch.arange(first, first + len(labels)), every, len(every))

    def chosen(self, positions: Tensor) -> Bank:
        """Return a bank with only the images at `positions` of the whole bank."""
        mine = torch.isin(self.positions, positions)
        return replace(
            self, features=self.features[mine], positions=self.positions[mine], size=len(torch.unique(positions))
        )


class Neighbours(NamedTuple):
    """The nearest bank images of each query, nearest first.

    Attributes:
        similarity: Cosine similarities, (M, k), float64.
        position: Positions in the bank, (M, k), int64.
        label: Labels, (M, k), int64.
    """

    similarity: Tensor
    position: Tensor
    label: Tensor


def find_neighbours(bank: Bank, queries: Tensor, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find the k images of a bank with the largest cosine similarity to each query.

    Args:
        bank: Bank on the CPU; it is moved to the device in chunks.
        queries: Features of the queries, (M, D).
        k: Number of neighbours, at least 1. A bank with fewer images gives all of them.
        device: Device of the computation if it is a CUDA device, otherwise the CPU, because others may lack float64.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978),
        sec. 3.4.
    """
    return _decoded(_nearest(bank, queries, k, device), bank)


def find_neighbours_over_ranks(bank: Bank, queries: Tensor, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find neighbours in a bank `over_ranks`, as `find_neighbours` does. Every rank calls this with its own queries.

    Each rank searches its part of the bank for the queries of all ranks, and the best neighbours of all parts return to
    the rank of the query.
    """
    k = min(k, bank.size)
    mine = torch.empty(0)
    for source in range(ranks.world()):
        found = _nearest(bank, ranks.broadcast_rows(queries, source), k, device)
        parts = ranks.gather_rows(F.pad(found, (0, k - found.shape[1]), value=NO_NEIGHBOUR), source)
        if parts:
            mine = torch.cat(parts, dim=1).topk(k, dim=1).values
    return _decoded(mine, bank)


def count_hits(neighbours: Neighbours, labels: Tensor, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """Count how often the vote of the first k neighbours is right, for several k.

    Each neighbour votes for its label with weight exp(similarity / temperature).

    Args:
        neighbours: Neighbours of M queries, at least as many as the largest k, or the whole bank.
        labels: True classes, (M,), int64, not negative.
        ks: Numbers of neighbours that vote, at least 1 each.
        temperature: Temperature of the weights, above 0.

    Returns:
        For each k, the number of queries whose class came first, and among the first five; (2,), int64.
    """
    classes, voted = torch.unique(neighbours.label, return_inverse=True)
    own = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    own = torch.where(classes[own] == labels, own, -1)  # -1: no neighbour has this class
    hits = {k: torch.zeros(2, dtype=torch.int64) for k in ks}
    for rows in torch.split(torch.arange(len(labels)), _QUERY_CHUNK):
        similarity = neighbours.similarity[rows]
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # at most 1: nothing overflows
        votes = torch.zeros(len(rows), len(classes), dtype=torch.float64)
        counted = 0
        for k in sorted(ks):
            votes.scatter_add_(1, voted[rows, counted:k], weights[:, counted:k])
            counted = k
            hits[k] += _hits(votes, own[rows])
    return hits


def _hits(votes: Tensor, own: Tensor) -> Tensor:
    """Count the queries whose `own` class (m,) is first, and among the first five, by `votes` (m, C)."""
    mine = votes.gather(1, own.clamp_min(0).unsqueeze(1))
    earlier = torch.arange(votes.shape[1]) < own.unsqueeze(1)
    before = ((votes > mine) | ((votes == mine) & earlier)).sum(1)
    got_votes = (own >= 0) & (mine.squeeze(1) > 0)
    return torch.stack([(got_votes & (before < place)).sum() for place in (1, 5)])


def _nearest(bank: Bank, queries: Tensor, k: int, device: torch.device | str) -> Tensor:
    """Return keys of the nearest bank images of this process, largest first, (M, min(k, n)), int64, on the CPU."""
    device = device if torch.device(device).type == "cuda" else "cpu"
    mine = units(queries, device)
    best = [torch.empty(len(rows), 0, dtype=torch.int64, device=device) for rows in torch.split(mine, _QUERY_CHUNK)]
    for features, positions in zip(
        *(torch.split(part, _BANK_CHUNK) for part in (bank.features, bank.positions)), strict=True
    ):
        chunk, positions = units(features, device), positions.to(device)
        for number, rows in enumerate(torch.split(mine, _QUERY_CHUNK)):
            keys = torch.cat([best[number], neighbour_keys(rows @ chunk.T, positions)], dim=1)
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values
    return torch.cat(best).cpu()


def units(features: Tensor, device: torch.device | str) -> Tensor:
    """Normalise features (N, D) to length 1, in float64, on a device."""
    return F.normalize(features.to(device).double(), dim=1)


def levels(similarity: Tensor) -> Tensor:
    """Round similarities to multiples of 2**-36, as int64. Equal ones stay equal however they were computed."""
    return (similarity * _LEVELS).round().long()


def neighbour_keys(similarity: Tensor, positions: Tensor) -> Tensor:
    """Return one number per pair: larger for a larger similarity, and for an earlier position among equals."""
    return levels(similarity).bitwise_left_shift(_POSITION_BITS).bitwise_or(_LAST_POSITION - positions)


def decode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities, float64, and the positions, int64, of `neighbour_keys`."""
    return (keys >> _POSITION_BITS).double() / _LEVELS, _LAST_POSITION - (keys & _LAST_POSITION)


def _decoded(keys: Tensor, bank: Bank) -> Neighbours:
    similarity, position = decode_keys(keys)
    return Neighbours(similarity, position, bank.labels[position])
