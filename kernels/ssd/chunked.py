"""The SSD as matrix products over chunks, in plain PyTorch.

It runs where no kernel can: without a C++ compiler, under the transforms of `torch.func`, and in exported graphs, whose
nodes are matrix products and no loops.
"""

# B batch, L tokens = K chunks of Q, H = G R heads, P channels of a head, G groups of R heads, N state

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.ssd.inputs import SSDInputs

_CHUNK = 64


def ssd_in_chunks(inputs: SSDInputs) -> Tensor:
    """Compute an SSD, (B, L, H, P), in float32, or in float64 for a float64 x.

    Inside a chunk, token t reads token s through the product of C_t . B_s and the decay between them, one matrix for
    both directions. Between chunks it reads the states that enter the chunk from either side.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060), section 6, for one direction.
    """
    with without_autocast(inputs.x.device.type):
        return _in_chunks(inputs)


def _in_chunks(inputs: SSDInputs) -> Tensor:
    x, D = inputs.x, inputs.D
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    _, tokens, _, _, groups, _ = inputs.sizes
    chunk = min(inputs.chunk or _CHUNK, -(-tokens // 16) * 16)

    def by_chunk(rows: Tensor) -> Tensor:
        """Return rows (B, L, H or G, ...) as (B, K, G, R or 1, Q, ...); zeros fill the last chunk."""
        rows = torch.unflatten(rows.to(dtype), 2, (groups, -1))
        rows = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, -tokens % chunk))
        return torch.unflatten(rows, 1, (-1, chunk)).movedim(2, 4)

    x_k, B, C = (by_chunk(rows) for rows in (x, inputs.B, inputs.C))
    weights, from_states = x_k.new_zeros(()), x_k.new_zeros(())
    for dt, A, reverse in inputs.directions:
        step = by_chunk(dt)  # (B, K, G, R, Q)
        log_decay = step * A.to(dtype).view(groups, -1, 1)
        decays = _decays(log_decay, reverse)
        weights = weights + decays * step.unsqueeze(-2)
        if x_k.shape[1] > 1:
            to_edge = decays[..., 0 if reverse else -1, :] * step  # to the edge at which states leave the chunk
            left = (B * to_edge.unsqueeze(-1)).mT @ x_k  # (B, K, G, R, N, P)
            from_edge = log_decay.flip(-1).cumsum(-1).flip(-1) if reverse else log_decay.cumsum(-1)
            entering = _entering(left, log_decay.sum(-1), reverse)
            from_states = from_states + (C * from_edge.exp().unsqueeze(-1)) @ entering
    y = inputs.scale * (((C @ B.mT) * weights) @ x_k + from_states)  # (B, K, G, R, Q, P)
    y = y.movedim(4, 2).flatten(1, 2)[:, :tokens].flatten(2, 3).contiguous()
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x.to(dtype)
    return y if inputs.wide else y.to(x.dtype)


def _decays(log_decay: Tensor, reverse: bool) -> Tensor:
    """Return the decay on the way from s to t, (..., Q, Q), at [t, s]; 0 where t does not read s.

    A way passes the steps after s up to t, or, in reverse, those before s down to t. Each sum adds numbers of one sign.
    Differences of running sums would be shorter, but lose all digits of small decays beside a large one.

    Args:
        log_decay: Logarithm of the decay at every step, (..., Q).
        reverse: t reads itself and what follows, not what precedes.
    """
    every = torch.ones(log_decay.shape[-1], log_decay.shape[-1], dtype=torch.bool, device=log_decay.device)
    if reverse:
        before = F.pad(log_decay[..., :-1], (1, 0)).unsqueeze(-2)
        sums = before.masked_fill(every.tril(), 0).cumsum(-1)
        return sums.masked_fill(every.tril(-1), -torch.inf).exp()
    sums = log_decay.unsqueeze(-1).masked_fill(every.triu(), 0).cumsum(-2)
    return sums.masked_fill(every.triu(1), -torch.inf).exp()


def _entering(left: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    """Return the state that enters every chunk, (B, K, G, R, N, P).

    Args:
        left: States that each chunk leaves when none enters it, (B, K, G, R, N, P).
        log_decay: Logarithm of the decay across each chunk, (B, K, G, R).
        reverse: States enter from the following chunk instead of the chunk before.
    """
    decays = _decays(log_decay.movedim(1, -1), reverse)  # (B, G, R, K, K)
    leaving = (decays @ left.movedim(1, 3).flatten(-2)).movedim(3, 1)  # (B, K, G, R, N P)
    rest = leaving[:, 1:] if reverse else leaving[:, :-1]
    return torch.unflatten(F.pad(rest, (0, 0) * 3 + ((0, 1) if reverse else (1, 0))), -1, left.shape[-2:])
