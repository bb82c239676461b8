"""Masks of iBOT: places of the last map whose patches the student does not see.

Legend: N views, h x w places of the last map of a view, L = h w, M masked places of all views
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

Counts = Literal["spread", "drawn"]
MaskShape = Literal["block", "random"]
_ATTEMPTS = 10  # places that a block is tried at before the rest is drawn at random, as in BEiT


class Drawn(NamedTuple):
    """Masks of a batch.

    Attributes:
        hidden: True at masked places, (N, h, w), bool.
        places: Numbers of the masked places among all N * L, (M,), int64, ascending.
        weight: Weight of each of them in the loss, (M,), float32: 1 / (masked places of its view * N).
    """

    hidden: Tensor
    places: Tensor
    weight: Tensor

    @classmethod
    def none(cls, N: int, grid: tuple[int, int]) -> Drawn:
        """Return the masks of N views that hide nothing."""
        return cls(torch.zeros(N, *grid, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def to(self, device: torch.device) -> Drawn:
        """Copy the masks to a device. The host does not wait for it."""
        return Drawn(*(one.to(device, non_blocking=True) for one in self))


@dataclass
class Masks:
    """Settings of the masks of iBOT. A masked place is one position of the encoder's last map.

    Args:
        fraction: Share of the global views that are masked, in (0, 1].
        ratio: Least and greatest share of the places of a masked view, 0 < least <= greatest < 1.
        counts: "spread" masks exactly `fraction` of the views of a batch, n of them. The k-th of these has the share
            `least + k (greatest - least) / n` of its places masked, k = 1 ... n, rounded down, as in DINOv3; the order
            of the views is random. All batches of a size then have equally many masked places. "drawn" is the rule of
            iBOT: each view is masked with probability `fraction`, and its share is uniform in `ratio`, so the number of
            masked places changes from batch to batch. At least one place of a masked view is masked, and one is not.
        shape: "block" for rectangles that may overlap, each lower and narrower than the map; they are added until the
            share is reached, or 10 in a row do not fit. The rest is drawn at random, so the share is exact; iBOT leaves
            the rest out. "random" for single places.
        min_block: Smallest area of a rectangle in places, at least 1; fewer if fewer are left. iBOT's is
            (min(h, w) // 3)^2, 16 of 14 x 14 places.
        aspect: Least and greatest aspect ratio of a rectangle, above 0; its logarithm is uniform.

    Raises:
        UserError: If an argument is out of range.

    Source: Zhou et al., "iBOT" (arXiv:2111.07832), appendix E; blocks as in Bao et al., "BEiT" (arXiv:2106.08254),
        algorithm 1.
    """

    fraction: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    counts: Counts = "spread"
    shape: MaskShape = "block"
    min_block: int = 4
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        self.ratio, self.aspect = (self.ratio[0], self.ratio[1]), (self.aspect[0], self.aspect[1])
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"Masks: fraction is a share of the global views in (0, 1]; got {self.fraction}. 0.5 is usual."
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise UserError(
                f"Masks: ratio is two shares, 0 < least <= greatest < 1; got {list(self.ratio)}. Set [0.1, 0.5]."
            )
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise UserError(
                f"Masks: aspect is two ratios, 0 < least <= greatest; got {list(self.aspect)}. Set [0.3, 3.3]."
            )
        if self.min_block < 1:
            raise UserError(f"Masks: min_block is at least 1 place; got {self.min_block}. 4 is usual.")
        for name, kinds in (("counts", Counts), ("shape", MaskShape)):
            if getattr(self, name) not in get_args(kinds):
                raise UserError(f"Masks: {name} is {' or '.join(get_args(kinds))}; got {getattr(self, name)!r}.")

    def draw(self, N: int, grid: tuple[int, int], generator: torch.Generator | None = None) -> Drawn:
        """Draw the masks of N views on the CPU.

        Args:
            N: Number of views.
            grid: h, w, at least two places.
            generator: Random generator of the CPU that fixes the draw; None for the global one.

        Raises:
            UserError: If the views have a single place.
        """
        if grid[0] * grid[1] < 2:
            raise UserError(
                "Masks: a view has two places or more on the encoder's last map, to hide some of them; got 1. Enlarge "
                "data.image_size, or set model.ibot to 0."
            )
        wanted = self._wanted(N, grid[0] * grid[1], generator)
        masks = torch.zeros(N, *grid, dtype=torch.bool)
        if self.shape == "block":
            self._add_blocks(masks, wanted, generator)
        masks = _top_up(masks.flatten(1), wanted, generator)
        places = masks.flatten().nonzero().squeeze(1)
        weight = (1 / (N * wanted.clamp(min=1)))[places // masks.shape[1]]
        return Drawn(masks.view(N, *grid), places, weight)

    def _wanted(self, N: int, L: int, generator: torch.Generator | None) -> Tensor:
        """Return the number of masked places of each view, (N,), int64."""
        least, greatest = self.ratio
        if self.counts == "drawn":
            shares = least + (greatest - least) * torch.rand(N, generator=generator)
            counts = (shares * L).long().clamp(1, L - 1)
            return counts * (torch.rand(N, generator=generator) < self.fraction)
        masked = max(1, int(N * self.fraction))
        shares = torch.linspace(least, greatest, masked + 1)[1:]
        counts = torch.zeros(N, dtype=torch.int64)
        counts[torch.randperm(N, generator=generator)[:masked]] = (shares * L).long().clamp(1, L - 1)
        return counts

    def _add_blocks(self, masks: Tensor, wanted: Tensor, generator: torch.Generator | None) -> None:
        """Add rectangles to `masks` (N, h, w) in place, to all views at once, while one fits among 10 attempts."""
        N, h, w = masks.shape
        rows, columns = torch.arange(h).view(1, h, 1), torch.arange(w).view(1, 1, w)
        low, high = (math.log(one) for one in self.aspect)
        failed = torch.zeros(N, dtype=torch.int64)
        left = wanted.clone()
        while bool(((left > 0) & (failed < _ATTEMPTS)).any()):
            area, aspect, y, x = torch.rand(4, N, generator=generator)
            area = left.clamp(max=self.min_block) * (1 - area) + left * area
            aspect = (low + (high - low) * aspect).exp()
            height = (area * aspect).sqrt().round().long()
            width = (area / aspect).sqrt().round().long()
            top, start = (y * (h - height + 1)).long(), (x * (w - width + 1)).long()
            block = _between(rows, top, height) & _between(columns, start, width)
            new = (block & ~masks).sum(dim=(1, 2))
            fits = (height < h) & (width < w) & (new > 0) & (new <= left) & (failed < _ATTEMPTS)
            masks |= block & fits.view(N, 1, 1)
            left = torch.where(fits, left - new, left)
            failed = torch.where(fits, 0, failed + 1)


def _between(places: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Return whether places lie in [start, start + length) of each view."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    return (places >= start) & (places < start + length)


def _top_up(masks: Tensor, wanted: Tensor, generator: torch.Generator | None) -> Tensor:
    """Add random places to masks (N, L) until each view has as many as wanted (N,)."""
    order = torch.rand(masks.shape, generator=generator) - masks.float()  # masked places first
    rank = order.argsort(dim=1).argsort(dim=1)
    return rank < wanted.unsqueeze(1)
