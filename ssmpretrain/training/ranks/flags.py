"""Whether any rank has something to say, asked at every step without waiting for the answer."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ssmpretrain.base import ranks


class AnyRank:
    """The greatest number that any rank gave, one call late, so that nobody waits for the others.

    All ranks make the same calls in the same order; so all get the same answers. In a process of its own the answer
    comes at once, and nothing is sent. The group is of gloo, on the CPU: no GPU waits either.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if ranks.world() > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def ask(self, number: int) -> int:
        """The greatest number that any rank gave at its previous call; 0 at the first."""
        if self._group is None:
            return number
        answer = self._answer()
        if not answer:
            greatest = torch.tensor([number])
            work = dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = (greatest, work)
        return answer

    def ask_and_wait(self, number: int) -> int:
        """The greatest number that any rank gave, now."""
        return self.ask(number) or self._answer()

    def least(self, number: int) -> int:
        """The least number that any rank gave, now."""
        if self._group is None:
            return number
        least = torch.tensor([number])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        return int(least)

    def all_equal(self, number: int) -> bool:
        """Whether all ranks gave the same number, now."""
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
