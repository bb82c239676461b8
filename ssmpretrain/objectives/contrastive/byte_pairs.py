"""Byte-pair encoding of one word, in a time that grows with its length and not with the square of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush


def merge_pairs(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join neighbours of a word: everywhere, from the left, the pair of the lowest rank, then the next, until none has
    a rank.

    Args:
        symbols: The word's characters, none of them empty.
        ranks: Of the pairs that are joined; no two have the same.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (arXiv:1508.07909),
        algorithm 1.
    """
    parts = list(symbols)  # the part that begins at each place; "" where one before it goes on
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    found: dict[int, list[int]] = {}  # by rank: where such a pair began when it was noted
    waiting: list[int] = []  # heap of those ranks

    def note(left: int) -> None:
        if left < 0 or after[left] == len(parts):
            return
        rank = ranks.get((parts[left], parts[after[left]]))
        if rank is not None:
            if rank not in found:
                heappush(waiting, rank)
            found.setdefault(rank, []).append(left)

    for left in range(len(parts)):
        note(left)
    while waiting:
        rank = heappop(waiting)
        for left in sorted(found.pop(rank)):
            right = after[left]
            if right == len(parts) or ranks.get((parts[left], parts[right])) != rank:
                continue  # one of the two has become part of another
            parts[left], parts[right] = parts[left] + parts[right], ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            note(before[left])
            note(left)
    return [part for part in parts if part]
