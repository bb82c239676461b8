"""Nearest neighbours of images among labelled ones, and the hits of their vote.

Exact, and the same on one process as on many: which neighbours are found depends on the features alone, not on how the
bank is cut up. Similarities are computed in float64 and rounded to a multiple of 2**-36, far coarser than the error of
the computation, so that equal images are equally near; of equally near ones the earlier in the bank is taken.

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
_NO_NEIGHBOUR = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Bank:
    """Labelled images to find neighbours among; under several ranks, this rank's part of them.

    Attributes:
        features: (n, D).
        positions: Which images of the whole bank these are, (n,), int64.
        labels: Of the whole bank, (all,), int64; a chosen part is looked up in it too.
        size: N, images that can be found, over all ranks.
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
        """Make a bank of this process's images alone, (N, D) and (N,)."""
        return cls(features, torch.arange(len(labels)), labels, len(labels))

    @classmethod
    def over_ranks(cls, features: Tensor, labels: Tensor) -> Bank:
        """Make a bank of the images of all ranks; each keeps its own, (n, D) and (n,)."""
        parts = ranks.gather(labels)
        first = sum(len(part) for part in parts[: ranks.rank()])
        every = torch.cat(parts)
        return cls(features, torch.arange(first, first + len(labels)), every, len(every))

    def chosen(self, positions: Tensor) -> Bank:
        """Return the bank with only the images at these positions."""
        mine = torch.isin(self.positions, positions)
        return replace(
            self, features=self.features[mine], positions=self.positions[mine], size=len(torch.unique(positions))
        )


class Neighbours(NamedTuple):
    """The nearest bank images of each query, nearest first.

    Attributes:
        similarity: Cosine, (M, k), float64.
        position: In the bank, (M, k), int64.
        label: (M, k), int64.
    """

    similarity: Tensor
    position: Tensor
    label: Tensor


def find_neighbours(bank: Bank, queries: Tensor, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find the k images of a bank with the largest cosine similarity to each query, or all if it has fewer.

    Args:
        bank: On the CPU; it goes to the device in chunks.
        queries: (M, D).
        k: At least 1.
        device: Computes the similarities if it is a CUDA device; others may lack float64.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978),
        sec. 3.4.
    """
    return _decoded(_nearest(bank, queries, k, device), bank)


def find_neighbours_over_ranks(bank: Bank, queries: Tensor, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find neighbours as `find_neighbours` does, in a bank `over_ranks`; every rank calls this with its own queries.

    Queries go round, each rank searches its part of the bank for them, and the best of all parts come back.
    """
    k = min(k, bank.size)
    mine = torch.empty(0)
    for source in range(ranks.world()):
        found = _nearest(bank, ranks.broadcast_rows(queries, source), k, device)
        parts = ranks.gather_rows(F.pad(found, (0, k - found.shape[1]), value=_NO_NEIGHBOUR), source)
        if parts:
            mine = torch.cat(parts, dim=1).topk(k, dim=1).values
    return _decoded(mine, bank)


def count_hits(neighbours: Neighbours, labels: Tensor, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """Count how often the vote of the first k neighbours is right, for several k.

    Each neighbour votes for its label with weight exp(similarity / temperature).

    Args:
        neighbours: Of M queries, as many as the largest k, or all there are.
        labels: True classes, (M,), int64, not negative.
        ks: Numbers of neighbours that vote, at least 1 each.
        temperature: Above 0.

    Returns:
        Per k, the queries whose class came first, and among the first five; (2,), int64.
    """
    classes, voted = torch.unique(neighbours.label, return_inverse=True)
    own = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    own = torch.where(classes[own] == labels, own, -1)  # -1: nobody votes for it
    hits = {k: torch.zeros(2, dtype=torch.int64) for k in ks}
    for rows in torch.split(torch.arange(len(labels)), _QUERY_CHUNK):
        similarity = neighbours.similarity[rows]
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the largest is 1: nothing overflows
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
            keys = torch.cat([best[number], _keys(rows @ chunk.T, positions)], dim=1)
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values
    return torch.cat(best).cpu()


def units(features: Tensor, device: torch.device | str) -> Tensor:
    """Normalise features (N, D) to length 1, in float64, on a device."""
    return F.normalize(features.to(device).double(), dim=1)


def levels(similarity: Tensor) -> Tensor:
    """Round similarities to whole multiples of 2**-36, int64: equal ones stay equal however they were computed."""
    return (similarity * _LEVELS).round().long()


def _keys(similarity: Tensor, positions: Tensor) -> Tensor:
    """Return one number for each pair: larger for the more similar, and among equals for the earlier position."""
    return levels(similarity).bitwise_left_shift(_POSITION_BITS).bitwise_or(_LAST_POSITION - positions)


def _decoded(keys: Tensor, bank: Bank) -> Neighbours:
    similarity = (keys >> _POSITION_BITS).double() / _LEVELS
    position = _LAST_POSITION - (keys & _LAST_POSITION)
    return Neighbours(similarity, position, bank.labels[position])
