"""Search for the nearest neighbours of a few images, and counts of those that have the class of their query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base.shown_names import shown
from ssmpretrain.commands.feature_pictures.images import Picture, Pictured
from ssmpretrain.evaluation.nearest_so_far import Near, NearestSoFar

_LONGEST_KEY = 40  # characters


class QueryRow(NamedTuple):
    """A query and its neighbours, nearest first.

    Attributes:
        query: The query.
        near: Its neighbours.
        chance: Share of its class among the labelled images searched; None if the query has no label.
    """

    query: Picture
    near: list[Near[Picture]]
    chance: float | None

    def matches(self) -> tuple[int, int]:
        """Count the neighbours with the class of the query, and the neighbours with a class, if the query has one."""
        if (label := self.query.label) is None:
            return 0, 0
        labels = [one.item.label for one in self.near if one.item.label is not None]
        return labels.count(label), len(labels)

    def duplicates(self) -> int:
        """Count the neighbours whose pixels all equal those of the query."""
        return sum(one.item.looks_like(self.query) for one in self.near)


class Neighbourhood(NamedTuple):
    """The neighbours of all queries by one encoder.

    Attributes:
        word: Word for the encoder beside its rows; empty if it is the only one.
        heading: Line that says which encoder and weights these are.
        rows: A row for each query.
        searched: Number of images that were searched.
    """

    word: str
    heading: str
    rows: list[QueryRow]
    searched: int

    def matches(self) -> tuple[int, int]:
        """Sum `QueryRow.matches` over the queries."""
        pairs = [row.matches() for row in self.rows]
        return sum(same for same, _ in pairs), sum(total for _, total in pairs)


def search(
    word: str, heading: str, encode: Callable[[Tensor], Tensor], queries: Pictured, bank: Pictured, k: int
) -> Neighbourhood:
    """Find the k nearest images of each query by cosine similarity; the query itself does not count.

    Only the queries, their features, and the images that are nearest so far are in memory.

    Args:
        word, heading: As in `Neighbourhood`.
        encode: Maps images (B, 3, H, W) to features (B, D).
        queries: Batches of the queries.
        bank: Batches of the images to search.
        k: Number of neighbours, at least 1.
    """
    encoded = [(encode(images).float().cpu(), pictures) for images, pictures in queries]
    asked = [picture for _, pictures in encoded for picture in pictures]
    nearest = NearestSoFar[Picture](torch.cat([features for features, _ in encoded]), k)
    classes, itself = Counter[str | None](), [0] * len(asked)
    for images, pictures in bank:
        excluded = torch.tensor([[query.is_same(picture) for picture in pictures] for query in asked])
        nearest.add(encode(images).float().cpu(), pictures, excluded)
        classes.update(picture.label for picture in pictures)
        itself = [count + int(row.sum()) for count, row in zip(itself, excluded, strict=True)]
    labelled = sum(count for label, count in classes.items() if label is not None)
    rows = [
        QueryRow(query, near, _share(classes[query.label] - own, labelled - own) if query.label is not None else None)
        for query, near, own in zip(asked, nearest.nearest(), itself, strict=True)
    ]
    return Neighbourhood(word, heading, rows, nearest.seen)


def _share(count: int, total: int) -> float | None:
    return count / total if total > 0 else None


def table(found: Sequence[Neighbourhood]) -> list[str]:
    """Return lines that compare the neighbours of each query: how many have its class, or how similar they are."""
    words = [one.word or "neighbours" for one in found]
    rows = list(zip(*(one.rows for one in found), strict=True))
    keys = [_short(shown(row[0].query.key)) for row in rows]
    names = [shown(row[0].query.label or "") for row in rows]
    wide, name_wide = max(map(len, ["query", *keys])), max(map(len, ["class", *names]))
    labelled = any(total for one in found for _, total in [one.matches()])
    lines = [f"  {'query':<{wide}}  " + f"{'class':<{name_wide}}  " * labelled + "".join(f"{w:>26}" for w in words)]
    for key, name, row in zip(keys, names, rows, strict=True):
        cells = "".join(f"{_cell(one):>26}" for one in row)
        lines.append(f"  {key:<{wide}}  " + f"{name:<{name_wide}}  " * labelled + cells)
    if labelled:
        cells = "".join(f"{_of(*one.matches()):>26}" for one in found)
        lines.append(f"  {'of the class of their query':<{wide + name_wide + 4}}{cells}")
        chances = [row.chance for row in found[0].rows if row.chance is not None]
        lines.append(f"  expected of neighbours at random: {sum(chances) / max(1, len(chances)):.0%}")
    if duplicates := sum(row.duplicates() for row in found[0].rows):
        lines.append(f"  exact duplicates of their query among the neighbours: {duplicates}")
    return lines


def _cell(row: QueryRow) -> str:
    similar = f"{row.near[0].similarity:.3f} .. {row.near[-1].similarity:.3f}" if row.near else "none"
    same, total = row.matches()
    return f"{same} of {total}, {similar}" if total else similar


def _of(same: int, total: int) -> str:
    return f"{same} of {total} ({same / total:.0%})" if total else "no labels"


def _short(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else f"...{key[3 - _LONGEST_KEY :]}"
