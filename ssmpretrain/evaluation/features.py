"""Evaluation of frozen features: nearest neighbours, a linear probe, and the effective rank.

Legend: N bank images, M query images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.nearest_neighbours import Bank, count_hits, find_neighbours


class Encoded(NamedTuple):
    """Features of a batch of images.

    Attributes:
        features: Features (B, D), float32, on the CPU.
        labels: Labels (B,), int64; -1 for images without a label.
        keys: Names of the B images; empty if the data has no names.
    """

    features: Tensor
    labels: Tensor
    keys: list[str]


def check_has_bank(module: Any, where: str, remedy: str) -> None:
    """Raise unless a data module gives the labelled images that features are compared with.

    Args:
        module: Data module.
        where: Start of the error message.
        remedy: Sentence at its end that says what to do without such images.

    Raises:
        UserError: If the module has no `bank_dataloader(limit)`.
    """
    if not hasattr(module, "bank_dataloader"):
        raise UserError(
            f"{where}: a data module has bank_dataloader(limit), as those of ssmpretrain.datamodules have; "
            f"{type(module).__name__} has not. {remedy}"
        )


def encode_batches(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> Iterator[Encoded]:
    """Encode `batches` one by one, and yield the features of each.

    Args:
        encode: Maps images (B, 3, H, W) to features (B, D).
        batches: Mappings with "image" and, optionally, "label" (B,), with -1 for none, and "key", B names.
        device: Device of the images for `encode`.

    Raises:
        UserError: If the batches are those of a dense task, with class maps or objects.
    """
    for batch in batches:
        if "mask" in batch or "objects" in batch:
            raise UserError(
                "feature evaluation: images have one size and one label; got those of a dense task, with class maps or "
                "objects. Name labelled images with --train and --val; leave out the callback OnlineEvaluation."
            )
        with torch.inference_mode():
            features = encode(batch["image"].to(device)).float().cpu()
        labels = batch.get("label", torch.full((len(features),), -1)).cpu()
        yield Encoded(features, labels, list(batch.get("key", [""] * len(features))))


def collect_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Encode every image of `batches`; arguments as in `encode_batches`.

    Returns:
        Features (N, D), float32, and labels (N,), int64, both on the CPU.
    """
    encoded = list(encode_batches(encode, batches, device))
    if not encoded:
        raise UserError("feature evaluation: no image to encode. Check that the data path holds usable images.")
    return torch.cat([part.features for part in encoded]), torch.cat([part.labels for part in encoded])


def evaluate(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute the kNN accuracy, the linear-probe accuracy and the effective rank of features.

    Args:
        bank, queries: Features, (N, D) and (M, D).
        bank_labels, labels: Classes, (N,) and (M,), int64. Images with label -1 count only for the effective rank.
        k: Neighbours that vote.
        device: Device of the neighbour search.

    Returns:
        "knn" and "linear_probe", in [0, 1], if there are labels on both sides, and "effective_rank" of the queries.
    """
    results = {"effective_rank": effective_rank(queries)}
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    queries, labels = queries[labels >= 0], labels[labels >= 0]
    if len(bank) and len(queries):
        results["knn"] = knn_accuracy(bank, bank_labels, queries, labels, k, device=device)
        results["linear_probe"] = linear_probe_accuracy(bank, bank_labels, queries, labels)
    return results


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> float:
    """Compute the top-1 accuracy in [0, 1] of a weighted k-nearest-neighbour vote by cosine similarity.

    Args:
        bank, queries: Features, (N, D) and (M, D).
        bank_labels, labels: Classes, (N,) and (M,), int64, not negative.
        k: Neighbours that vote; at most N vote.
        temperature: As in `count_hits`.
        device: As in `find_neighbours`.
    """
    neighbours = find_neighbours(Bank.of(bank, bank_labels), queries, k, device)
    first, _ = count_hits(neighbours, labels, [k], temperature)[k].tolist()
    return int(first) / len(labels)


def linear_probe_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, l2: float = 1e-3, max_steps: int = 200
) -> float:
    """Compute the top-1 accuracy in [0, 1] of multinomial logistic regression on standardised, frozen features.

    L-BFGS fits the classifier to the minimum, so the result depends only on the features. There is no learning rate and
    no seed.

    Args:
        bank, queries: Features, (N, D) and (M, D). They are standardised with mean and deviation of the bank.
        bank_labels, labels: Classes, (N,) and (M,), int64, not negative.
        l2: Weight of the squared norm of the classifier, added to the mean cross-entropy; at least 0.
        max_steps: Greatest number of L-BFGS iterations.
    """
    mean, std = bank.mean(0), bank.std(0).clamp_min(1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(bank_labels.max()) + 1
    with torch.inference_mode(False), torch.enable_grad():
        features, targets = bank.clone(), bank_labels.clone()  # tensors made in inference mode carry no gradient
        weight = torch.zeros(features.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(features @ weight + bias, targets) + l2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    predicted = (queries @ weight.detach() + bias.detach()).argmax(1)
    return float((predicted == labels).float().mean())


def effective_rank(features: Tensor) -> float:
    """Compute the exponential of the entropy of the normalised singular values of `features` (N, D).

    The effective rank lies between 1 and min(N, D). It falls towards 1 when the features collapse onto a line.

    Source: Garrido et al., "RankMe" (arXiv:2210.02885), eq. 1.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))
