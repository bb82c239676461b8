"""The losses of DINO, iBOT and KoLeo, and the two ways to make targets from the teacher's logits.

All are computed in float32 with autocast off. Targets carry no gradient.

Legend: B images, T global views, S views, N rows (views or patches of this rank), M masked patches, K prototypes,
D encoder width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError


def _in_float32(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


# Targets


@torch.no_grad()
def centred_softmax(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Return the targets `softmax((g - c) / t)`.

    Args:
        logits: Teacher's logits g, (..., K).
        centre: Moving average c of the teacher's logits, (K,).
        temperature: t, above 0.
    """
    with _in_float32(logits):
        return F.softmax((logits.float() - centre) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Return targets that use all prototypes equally over the rows of all ranks.

    `exp(g / t)` is divided by turns: each prototype by its sum over the rows of all ranks, each row by its sum over the
    prototypes. Published code also divides by the number of rows, the number of prototypes and the first total; these
    factors are the same for all elements, and the last division by rows cancels them. The divisions are subtractions
    of logarithms here, so no logit overflows. Ranks may have different numbers of rows.

    Args:
        logits: Teacher's logits g, (N, K).
        temperature: t, above 0.
        iterations: Number of divisions by prototypes and by rows, at least 1.

    Returns:
        Probabilities, (N, K), float32; each row has the sum 1.

    Source: Caron et al., "SwAV" (arXiv:2006.09882), section 3.1; Oquab et al., "DINOv2" (arXiv:2304.07193), section 4.
    """
    with _in_float32(logits):
        log_q = logits.float() / temperature
        for _ in range(iterations):
            log_q -= _log_sum_of_all_rows(log_q)
            log_q -= log_q.logsumexp(dim=1, keepdim=True)
        return log_q.exp_()


def _log_sum_of_all_rows(x: Tensor) -> Tensor:
    """Return the logarithm (K,) of the sum of `exp(x)`, x (N, K), over the rows of all ranks."""
    if ranks.world() == 1 and len(x):
        return x.logsumexp(dim=0)
    greatest = x.amax(dim=0) if len(x) else x.new_full((x.shape[1],), torch.finfo(x.dtype).min)
    if ranks.world() > 1:
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return ranks.total((x - greatest).exp().sum(dim=0)).log() + greatest


@torch.no_grad()
def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks."""
    return ranks.total(values) / ranks.world()


# Losses


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of each teacher view with each other view of the student, a scalar.

    The loss is the mean of `-sum_k P_t log P_s` over the images and over the pairs (t, s), s != t: 18 pairs of 2 global
    and 8 local views. DINOv3 weights the pairs of globals by 2 / 18 and those with locals by 16 / 18, each times its
    own mean, which is the same number.

    Args:
        student: Student's logits of all views, (B, S, K), S at least 2. The first T views are those of the targets.
        targets: Teacher's probabilities of the global views, (B, T, K).
        temperature: Student's temperature, above 0.

    Source: Caron et al. (arXiv:2104.14294), equation 3.
    """
    B, T = targets.shape[:2]
    with _in_float32(student):
        log_p = F.log_softmax(student.float() / temperature, dim=-1)
        others = log_p.sum(dim=1, keepdim=True) - log_p[:, :T]  # (B, T, K): of all views but t
        return -(targets * others).sum() / (B * T * (student.shape[1] - 1))


def ibot_loss(student: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Compute the weighted sum of the cross-entropies of masked patches, a scalar.

    Args:
        student: Student's logits of masked patches, (M, K).
        targets: Teacher's probabilities of the same patches of the same view, (M, K).
        weight: Weight of each patch, (M,): one over the number of masked patches of its view and the number of views.
            Views without a mask count as 0, as in published code.
        temperature: Student's temperature, above 0.

    Source: Zhou et al., "iBOT" (arXiv:2111.07832), equation 2.
    """
    with _in_float32(student):
        log_p = F.log_softmax(student.float() / temperature, dim=-1)
        return -(weight * (targets * log_p).sum(dim=-1)).sum()


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute `-mean log(|x_i - x_nn(i)| + eps)` of features of length 1, a scalar; it spreads features evenly.

    Args:
        x: Features of one view of the images of this rank, (B, D), B at least 2. They are scaled to length 1 first. The
            nearest neighbour nn(i) is searched among them.
        eps: Added to the distance.

    Raises:
        UserError: If there is no neighbour.

    Source: Sablayrolles et al., "Spreading vectors for similarity search" (arXiv:1806.03198), equation 2; DINOv2.
    """
    if len(x) < 2:
        raise UserError(
            "KoLeo: the nearest neighbour is another image of the batch of a rank; got 1 image. Raise data.batch_size, "
            "or set model.koleo to 0."
        )
    with _in_float32(x):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2).argmax(dim=1)
        distance: Tensor = torch.linalg.vector_norm(x - x[nearest], dim=-1)
        return -(distance + eps).log().mean()
