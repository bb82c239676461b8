"""The SSD as matrix products over chunks, in plain PyTorch.

It runs where no kernel can: without a C++ compiler, under the transforms of `torch.func`, and in exported graphs, whose
nodes are matrix products and no loops.
"""

# B batch, L tokens = K chunks of Q, H heads, P channels of a head, G groups of R heads, N state

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.ssd.inputs import MIN_LOG_DECAY, SSDInputs

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
    _, tokens, heads, _, groups, _ = inputs.sizes
    chunk = min(inputs.chunk or _CHUNK, -(-tokens // 16) * 16)
    padding = -tokens % chunk

    def by_chunk(rows: Tensor) -> Tensor:
        """Return rows (B, L, G or H, ...) as (B, K, G, Q, ...) or (B, K, G, R, Q, ...); zeros fill the last chunk."""
        rows = F.pad(rows.to(dtype), (0, 0) * (rows.ndim - 2) + (0, padding))
        rows = rows.unflatten(1, (-1, chunk)).transpose(2, 3)
        return rows.unflatten(2, (groups, -1)) if rows.shape[2] == heads and groups != heads else rows

    x_k = by_chunk(x).unflatten(2, (groups, -1)) if groups == heads else by_chunk(x)  # (B, K, G, R, Q, P)
    B, C = (by_chunk(rows) for rows in (inputs.B, inputs.C))  # (B, K, G, Q, N)
    products = (C @ B.mT).unsqueeze(3)  # (B, K, G, 1, Q, Q)
    weights = torch.zeros((), dtype=dtype, device=x.device)
    y = torch.zeros((), dtype=dtype, device=x.device)
    for dt, A, reverse in inputs.directions:
        step = by_chunk(dt.unsqueeze(-1)).squeeze(-1)
        step = step.unflatten(2, (groups, -1)) if groups == heads else step  # (B, K, G, R, Q)
        log_decay = (step * A.to(dtype).view(groups, -1, 1)).clamp(min=MIN_LOG_DECAY)
        before = log_decay.cumsum(-1) - log_decay  # of the steps before each token
        after = log_decay.flip(-1).cumsum(-1).flip(-1) - log_decay
        inner = before if reverse else before + log_decay
        difference = inner.unsqueeze(-2) - inner.unsqueeze(-1) if reverse else inner.unsqueeze(-1) - inner.unsqueeze(-2)
        reads = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device)
        reads = reads.triu() if reverse else reads.tril()
        weights = weights + difference.masked_fill(~reads, -torch.inf).exp() * step.unsqueeze(-2)

        to_edge = before if reverse else after  # from each token to the edge at which its state leaves the chunk
        left = (B.unsqueeze(3) * (to_edge.exp() * step).unsqueeze(-1)).mT @ x_k  # (B, K, G, R, N, P)
        from_edge = after + log_decay if reverse else before + log_decay
        entering = _carried(left, log_decay.sum(-1).clamp(min=MIN_LOG_DECAY), reverse)
        y = y + (C.unsqueeze(3) * from_edge.exp().unsqueeze(-1)) @ entering
    y = inputs.scale * (y + (products * weights) @ x_k)  # (B, K, G, R, Q, P)
    y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :tokens]
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x.to(dtype)
    return y if inputs.wide else y.to(x.dtype)


def _carried(states: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    """Return the state that enters every chunk, from the states that the chunks leave, (B, K, G, R, N, P).

    Args:
        states: States that each chunk leaves when none enters it, (B, K, G, R, N, P).
        log_decay: Logarithm of the decay across each chunk, (B, K, G, R).
        reverse: States enter from the following chunk instead of the chunk before.
    """
    logs = log_decay.movedim(1, -1)  # (B, G, R, K)
    passed = logs.cumsum(-1)
    # chunk k reads the state of chunk j through all chunks between them
    between = passed - logs
    if reverse:
        difference = between.unsqueeze(-2) - passed.unsqueeze(-1)
        reads = torch.ones_like(difference[0, 0, 0], dtype=torch.bool).triu(1)
    else:
        difference = between.unsqueeze(-1) - passed.unsqueeze(-2)
        reads = torch.ones_like(difference[0, 0, 0], dtype=torch.bool).tril(-1)
    decay = difference.masked_fill(~reads, -torch.inf).exp()  # (B, G, R, K, K)
    flat = states.movedim(1, 3)  # (B, G, R, K, N, P)
    return (decay @ flat.flatten(-2)).unflatten(-1, flat.shape[-2:]).movedim(3, 1)
