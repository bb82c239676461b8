"""The inputs of an SSD, named and described once for all its implementations."""

from typing import NamedTuple

from torch import Tensor

from ssmpretrain.kernels.layouts import with_dense_rows


class SSDInputs(NamedTuple):
    """Tensors and settings of one call: the forward direction, the backward direction, or both.

    B batch, L tokens, H heads, P channels of a head, G groups of heads that share B and C, N state. Head h reads group
    h // (H / G). Any tensor may have any strides.
    """

    x: Tensor  # (B, L, H, P); float32, bfloat16 or float16
    B: Tensor  # (B, L, G, N), input projection, dtype of x
    C: Tensor  # (B, L, G, N), output projection, dtype of x
    D: Tensor | None  # (H,), float32, skip weight, added once
    dt: Tensor | None  # (B, L, H), float32, step sizes of the forward direction; None without it
    A: Tensor | None  # (H,), float32, negative for a decaying state; None without the forward direction
    dt_backward: Tensor | None  # (B, L, H), float32, of the direction from the last token to the first
    A_backward: Tensor | None  # (H,), float32
    scale: float  # factor of the sum of the directions; D x is not scaled
    chunk: int | None  # tokens of a chunk, a multiple of 16; None: the implementation decides
    wide: bool  # return float32 whatever the dtype of x is

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, L, H, P, G, N."""
        return (*self.x.shape, *self.B.shape[2:])

    def readable(self) -> "SSDInputs":
        """Return the inputs with the layouts that kernels read: rows with a last stride of 1, parameters contiguous."""
        x, B, C = (with_dense_rows(rows) for rows in (self.x, self.B, self.C))
        D, A, A_backward = (None if t is None else t.contiguous() for t in (self.D, self.A, self.A_backward))
        return self._replace(x=x, B=B, C=C, D=D, A=A, A_backward=A_backward)

    @property
    def directions(self) -> tuple[tuple[Tensor, Tensor, bool], ...]:
        """(dt, A, reverse) of every direction."""
        found = []
        if self.dt is not None and self.A is not None:
            found.append((self.dt, self.A, False))
        if self.dt_backward is not None and self.A_backward is not None:
            found.append((self.dt_backward, self.A_backward, True))
        return tuple(found)


MIN_LOG_DECAY = -100.0
"""Kernels take the logarithm of one step's decay as at least this: exp(-100) is zero beside any float32 sum.

It bounds running sums of these logarithms, so that their differences keep more digits behind a large step.
"""
