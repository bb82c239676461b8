"""Nearest neighbours, the linear probe and the effective rank, against independent computations."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssmpretrain.evaluation.features import (
    collect_features,
    effective_rank,
    knn_accuracy,
    linear_probe_accuracy,
)


def blobs(seed: int, n: int = 200, classes: int = 4, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99)) * 2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


def test_knn_agrees_with_a_loop() -> None:
    (bank, bank_labels), (queries, labels) = blobs(0), blobs(1)
    correct = 0
    for query, truth in zip(queries.numpy(), labels.numpy(), strict=True):
        similarity = bank.numpy() @ query / np.linalg.norm(bank.numpy(), axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-similarity)[:5]
        votes = np.bincount(bank_labels.numpy()[nearest], np.exp(similarity[nearest] / 0.07), minlength=4)
        correct += votes.argmax() == truth
    assert knn_accuracy(bank, bank_labels, queries, labels, k=5) == pytest.approx(correct / len(labels))
    assert 0.3 < correct / len(labels) < 1  # the question is neither trivial nor hopeless


def test_more_neighbours_than_bank_images_is_no_error() -> None:
    (bank, bank_labels), (queries, labels) = blobs(0, n=10), blobs(1, n=10)
    assert 0 <= knn_accuracy(bank, bank_labels, queries, labels, k=1000) <= 1


def test_linear_probe_agrees_with_scikit_learn() -> None:
    (bank, bank_labels), (queries, labels) = blobs(0), blobs(1)
    mean, std = bank.mean(0), bank.std(0)
    # scikit-learn minimises sum(cross-entropy) + |w|^2 / (2 C); ours mean(cross-entropy) + l2 |w|^2
    sklearn = LogisticRegression(C=1 / (2 * 1e-3 * len(bank)), max_iter=2000, tol=1e-8)
    sklearn.fit(((bank - mean) / std).numpy(), bank_labels.numpy())
    expected = sklearn.score(((queries - mean) / std).numpy(), labels.numpy())
    assert linear_probe_accuracy(bank, bank_labels, queries, labels) == pytest.approx(expected, abs=1 / len(labels))


def test_linear_probe_runs_inside_inference_mode() -> None:
    with torch.inference_mode():
        assert linear_probe_accuracy(*blobs(0), *blobs(1)) > 0.5


def test_effective_rank_counts_equal_directions_and_sees_collapse() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(10, 6)) == pytest.approx(1)


def test_features_are_collected_in_order_and_unlabelled_is_minus_one() -> None:
    batches = [{"image": torch.full((2, 3, 4, 4), float(i))} for i in range(3)]
    features, labels = collect_features(lambda images: images.flatten(1)[:, :2], batches)
    assert features[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and labels.tolist() == [-1] * 6


def test_images_of_a_dense_task_are_refused() -> None:
    with pytest.raises(ValueError, match="got those of a dense task"):
        collect_features(lambda images: images.mean((2, 3)), [{"image": torch.zeros(1, 3, 4, 4), "mask": None}])


def test_no_batch_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="no image to encode"):
        collect_features(lambda images: images, [])
