"""Losses and targets of DINO and iBOT: values and gradients worked by hand in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.joint_embedding.losses import (
    centred_softmax,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)

B, T, S, K, D = 3, 2, 5, 7, 4
ROUNDING = 3e-6  # float32: sums of tens of terms, 6e-8 a rounding, of logits divided by 0.1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape: int) -> Tensor:
    return drawn(*shape, seed=1).double().softmax(dim=-1)


def share(logits: Tensor, temperature: float) -> Tensor:
    """The softmax, written out."""
    powers = (logits / temperature).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def check(ours: Callable[[Tensor], Tensor], by_hand: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare value and gradient in float32 with those by hand in float64, also under autocast."""
    theirs = x.double().requires_grad_()
    expected = by_hand(theirs)
    expected.backward()
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = ours(leaf)
        value.backward()
        assert leaf.grad is not None and theirs.grad is not None
        assert value.dtype == torch.float32
        assert abs(value.item() - expected.item()) < ROUNDING * abs(expected.item())
        assert (leaf.grad - theirs.grad).norm() < ROUNDING * theirs.grad.norm()


@pytest.mark.parametrize("views", [S, T])
def test_dino_loss_is_the_mean_over_all_pairs_of_different_views(views: int) -> None:
    targets = probabilities(B, T, K)

    def by_hand(student: Tensor) -> Tensor:
        pairs = [
            -(targets[b, t] * share(student[b, s], 0.1).log()).sum()
            for b in range(B) for t in range(T) for s in range(views) if s != t
        ]  # fmt: skip
        return torch.stack(pairs).mean()

    check(lambda x: dino_loss(x, targets.float(), 0.1), by_hand, drawn(B, views, K))


def test_weights_of_dinov3_for_global_and_local_pairs_give_the_same_loss() -> None:
    student, targets = drawn(B, 10, K), probabilities(B, T, K).float()
    of_pair = torch.tensor(
        [
            [dino_loss(student[:, [t, s]], targets[:, t : t + 1], 0.1) if s != t else 0 for s in range(10)]
            for t in (0, 1)
        ]
    )
    globals_, locals_ = of_pair[:, :2].sum() / 2, of_pair[:, 2:].mean()
    assert dino_loss(student, targets, 0.1).item() == pytest.approx(float(2 / 18 * globals_ + 16 / 18 * locals_), 1e-6)


def test_ibot_loss_is_a_mean_over_the_patches_of_a_view_and_then_over_views() -> None:
    counts = [2, 0, 3]  # masked patches of three views
    targets = probabilities(5, K)
    weight = torch.tensor([1 / (count * len(counts)) for count in counts for _ in range(count)])

    def by_hand(student: Tensor) -> Tensor:
        each = [-(target * share(one, 0.1).log()).sum() for one, target in zip(student, targets, strict=True)]
        return (torch.stack(each[:2]).mean() + 0 + torch.stack(each[2:]).mean()) / 3

    check(lambda x: ibot_loss(x, targets.float(), weight, 0.1), by_hand, drawn(5, K))


def test_koleo_is_the_log_distance_to_the_nearest_feature() -> None:
    def by_hand(x: Tensor) -> Tensor:
        x = torch.stack([one / one.square().sum().sqrt() for one in x])
        apart = [min((x[i] - x[j]).square().sum().sqrt() for j in range(len(x)) if j != i) for i in range(len(x))]
        return -torch.stack([(distance + 1e-8).log() for distance in apart]).mean()

    check(koleo_loss, by_hand, 3 * drawn(6, D))
    with pytest.raises(UserError, match=r"KoLeo: .* got 1 image"):
        koleo_loss(drawn(1, D))


def test_koleo_of_equal_features_has_a_finite_gradient() -> None:
    x = torch.ones(3, D, requires_grad=True)
    koleo_loss(x).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_targets_of_the_centre_are_a_softmax_of_what_is_left() -> None:
    logits, centre = drawn(B, T, K), drawn(K, seed=1)
    expected = share(logits.double() - centre.double(), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        ours = centred_softmax(logits, centre, 0.04)
    assert (ours - expected).abs().max() < ROUNDING


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The published loop: rows are prototypes, columns are samples."""
    q = (logits.double() / temperature).exp().T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / samples
    return (q * samples).T


@pytest.mark.parametrize("scale", [0.3, 3.0, 5.0])
def test_sinkhorn_knopp_is_the_published_loop(scale: float) -> None:
    logits = scale * drawn(12, K)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sinkhorn_knopp(logits, 0.04)
    assert ours.dtype == torch.float32
    assert (ours - plain_sinkhorn(logits, 0.04)).abs().max() < 1e-4  # float32 logits of up to 400: 3e-5 a rounding
    assert torch.allclose(ours.sum(dim=1), torch.ones(12))


def test_sinkhorn_knopp_does_not_overflow_where_the_published_loop_does() -> None:
    logits = drawn(12, K)
    assert not (100 * logits / 0.04).exp().isfinite().all()
    assert sinkhorn_knopp(100 * logits, 0.04).isfinite().all()
    assert sinkhorn_knopp(logits[:0], 0.04).shape == (0, K)


def test_sinkhorn_knopp_uses_all_prototypes_equally() -> None:
    used = sinkhorn_knopp(drawn(64, K), 1.0, iterations=20).sum(dim=0)
    assert torch.allclose(used, torch.full((K,), 64 / K), rtol=1e-3)
