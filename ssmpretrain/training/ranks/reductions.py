"""Reductions of one number over all ranks: greatest, least, equality. They run on the CPU, through gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ssmpretrain.base import ranks


class RankReductions:
    """Reduce one number over all ranks, without making a GPU wait.

    All ranks must make the same calls in the same order, and all get the same results. In a run with one process every
    result is the given number.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if ranks.world() > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def greatest_so_far(self, number: int) -> int:
        """Return the greatest number that any rank gave at its previous call; 0 at the first call. No rank waits.

        A call that returns more than 0 sends nothing. In a run with one process the result is `number` at once.

        Args:
            number: Number of this rank, at least 0.
        """
        if self._group is None:
            return number
        answer = self._answer()
        if not answer:
            greatest = torch.tensor([number])
            work = dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = (greatest, work)
        return answer

    def greatest(self, number: int) -> int:
        """Return the greatest number that any rank gave, at least 0. Every rank waits for the others."""
        return self.greatest_so_far(number) or self._answer()

    def least(self, number: int) -> int:
        """Return the least number that any rank gave. Every rank waits for the others."""
        if self._group is None:
            return number
        least = torch.tensor([number])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        return int(least)

    def all_equal(self, number: int) -> bool:
        """Return whether all ranks gave the same number. Every rank waits for the others."""
        if self._group is None:
            return True
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return int(ends[0]) == -int(ends[1])

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        (greatest, work), self._asked = self._asked, None
        work.wait()
        return int(greatest)
