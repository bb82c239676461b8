"""Byte-pair encoding of one word, in almost linear time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush


def merge_pairs(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join neighbouring symbols of a word by byte-pair encoding.

    Each round joins the pair with the lowest rank, everywhere in the word and from the left. The rounds end when no
    neighbouring pair has a rank.

    Args:
        symbols: Characters of the word; none is empty.
        ranks: Rank of each pair that may be joined; all ranks are different.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (arXiv:1508.07909),
        algorithm 1.
    """
    parts = list(symbols)  # the part that begins at each place; "" inside an earlier part
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    found: dict[int, list[int]] = {}  # by rank: places where such a pair began when it was noted
    waiting: list[int] = []  # heap of the ranks in `found`

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
                continue  # another join has used one of the two parts
            parts[left], parts[right] = parts[left] + parts[right], ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            note(before[left])
            note(left)
    return [part for part in parts if part]
