"""The matrix products around a scan on the GPU: from the input to B, C and step sizes, and back.

K routes, E channels, N states, R rank of the step size, P columns of x_dbl: N for B, N for C and R for the step size,
each padded to an even number, so that the scan reads them in pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.gpu.scan import row_of_C


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, (K, m, n) by (K, n, p), and return float32 whatever the inputs are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def num_columns(rank: int, state: int) -> int:
    """Return P."""
    return 2 * row_of_C(state) + -(-rank // 2) * 2


def in_row_order(x_proj: Tensor, rank: int, state: int) -> Tensor:
    """Reorder the rows of x_proj from step size, B, C to the columns of x_dbl: (K, R + 2N, E) to (K, P, E)."""
    dt, B, C = torch.split(x_proj, [rank, state, state], dim=1)
    return torch.cat([F.pad(rows, (0, 0, 0, rows.shape[1] % 2)) for rows in (B, C, dt)], dim=1)


def in_weight_order(rows: Tensor, rank: int, state: int) -> Tensor:
    """Undo `in_row_order`: (K, P, E) to (K, R + 2N, E)."""
    C = row_of_C(state)
    return torch.cat([rows[:, 2 * C : 2 * C + rank], rows[:, :state], rows[:, C : C + state]], dim=1)


def low_rank(x_dbl: Tensor, rank: int, state: int) -> Tensor:
    """Return the columns of x_dbl, (..., P), that give the step size, (..., R)."""
    first = 2 * row_of_C(state)
    return x_dbl[..., first : first + rank]


def gradient_rows(drows: Tensor, dlow_rank: Tensor) -> Tensor:
    """Return the gradient of x_dbl, (..., P), from those of B and C, (..., 2, N), and of the step size, (..., R)."""
    pieces = (drows[..., 0, :], drows[..., 1, :], dlow_rank)
    return torch.cat([F.pad(piece, (0, piece.shape[-1] % 2)) for piece in pieces], dim=-1)
