"""Image-to-text and text-to-image retrieval: recall at k, exact over ranks.

One process and many give the same result. Similarities are computed in float64 and rounded as in `nearest_neighbours`.
A wrong answer that is as similar as the right one counts as found before it. So a model with the same embedding for all
images finds nothing.

Legend: B images of this rank, T captions of this rank, E width of the common space
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.nearest_neighbours import levels, units

KS = (1, 5, 10)
_GALLERY_CHUNK, _QUERY_CHUNK = 8192, 1024  # 64 MiB of similarities at a time
_LEAST = torch.iinfo(torch.int64).min


class Retrieval:
    """Collect the embeddings of a validation set. Each rank keeps its own part.

    Args:
        width: E, width of the embeddings.
        device: Device that stores the embeddings. It must suit communication between ranks: the CPU for gloo.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._image = [torch.empty(0, width, device=device)]
        self._text = [torch.empty(0, width, device=device)]
        self._owner = [torch.empty(0, dtype=torch.int64, device=device)]
        self._images = 0

    def add(self, image: Tensor, text: Tensor, owner: Tensor) -> None:
        """Add a batch.

        Args:
            image: Image embeddings (B, E). Images without a caption are left out.
            text: Caption embeddings (T, E).
            owner: Index in the batch of the image that each caption belongs to, (T,), int64.
        """
        captioned, number = torch.unique(owner, return_inverse=True)
        self._image.append(image[captioned].detach().float().to(self._image[0]))
        self._text.append(text.detach().float().to(self._text[0]))
        self._owner.append((number + self._images).to(self._owner[0]))
        self._images += len(captioned)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings of captioned images (B, E), embeddings of captions (T, E), and owners (T,) of this rank."""
        return torch.cat(self._image), torch.cat(self._text), torch.cat(self._owner)

    def result(self, compute_on: torch.device | str | None = None) -> dict[str, float]:
        """Compute `recall` over all ranks. Every rank must call this."""
        image, text, owner = self.parts()
        return recall(image, text, owner, device=image.device if compute_on is None else compute_on)

    def num_images(self) -> int:
        """Count the images with captions of all ranks. Every rank must call this."""
        return sum(ranks.gather(self._images))


def recall(
    image: Tensor, text: Tensor, owner: Tensor, ks: Sequence[int] = KS, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compute recall at k: the fraction of queries with a right answer among the k most similar, by cosine.

    For an image, any of its captions is a right answer. Every rank calls this with its own part; the parts may have
    different sizes. The queries of each rank are compared with the parts of all ranks.

    Args:
        image: Embeddings of images, (B, E).
        text: Embeddings of captions, (T, E).
        owner: Index of the image that each caption belongs to, 0 to B - 1, (T,), int64. Every image has a caption.
        ks: Values of k, each at least 1.
        device: Device of the computation if it is a CUDA device, otherwise the CPU, because others may lack float64.

    Returns:
        "i2t_r1", "t2i_r1" and so on, in [0, 1], over the queries of all ranks; empty without queries.

    Raises:
        ValueError: On every rank, if an embedding on any rank is not finite.

    Source: Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments" (arXiv:1412.2306), section 4.2.
    """
    _check_finite(image, text)
    device = device if torch.device(device).type == "cuda" else "cpu"
    before = ranks.gather(len(image))[: ranks.rank()]
    mine = torch.arange(len(image), device=image.device) + sum(before)  # numbers of the images over all ranks
    paired = levels((units(image[owner], device) * units(text, device)).sum(dim=1)).to(owner.device)  # (T,)
    nearest = torch.full_like(mine, _LEAST).scatter_reduce(0, owner, paired, "amax")  # best caption of each image
    places = {
        "i2t": _places(image, nearest, mine, text, mine[owner], device),
        "t2i": _places(text, paired, mine[owner], image, mine, device),
    }
    found: dict[str, float] = {}
    for way, place in places.items():
        hits = [len(place), *((place < k).sum().item() for k in ks)]
        queries, *right = torch.tensor(ranks.gather(hits)).sum(dim=0).tolist()
        found |= {f"{way}_r{k}": count / queries for k, count in zip(ks, right, strict=True) if queries}
    return found


def _check_finite(image: Tensor, text: Tensor) -> None:
    """Raise on every rank if an embedding is not finite, so that no rank waits for another."""
    broken = [int((~part.isfinite().all(dim=1)).sum()) for part in (image, text)]
    images, texts = torch.tensor(ranks.gather(broken)).sum(dim=0).tolist()
    if images or texts:
        raise UserError(
            f"retrieval: embeddings are finite numbers; those of {images:,} images and {texts:,} captions are not. "
            "Look for the step at which the loss stopped being finite, or try precision 32."
        )


def _places(
    queries: Tensor, similarity: Tensor, own: Tensor, gallery: Tensor, numbers: Tensor, device: torch.device | str
) -> Tensor:
    """Count the wrong items in the gallery of all ranks that come before the best right item of each query.

    Args:
        queries: Embeddings of this rank's queries, (Q, E).
        similarity: Rounded similarity of the best right item of each query, (Q,), int64; see `levels`.
        own: Number of the image of each query, (Q,).
        gallery: Embeddings of this rank's part of the gallery, (G, E).
        numbers: Number of the image of each row of the gallery, (G,).
        device: Device of the computation.

    Returns:
        Counts (Q,), int64.
    """
    place = torch.zeros(len(queries), dtype=torch.int64, device=device)
    queries, similarity, own = units(queries, device), similarity.to(device), own.to(device)
    for source in range(ranks.world()):
        theirs = ranks.broadcast_rows(gallery, source), ranks.broadcast_rows(numbers, source)
        for features, number in zip(*(torch.split(part, _GALLERY_CHUNK) for part in theirs), strict=True):
            chunk, number = units(features, device), number.to(device)
            for start in range(0, len(queries), _QUERY_CHUNK):
                rows = slice(start, start + _QUERY_CHUNK)
                at_least = levels(queries[rows] @ chunk.T) >= similarity[rows, None]
                place[rows] += (at_least & (number != own[rows, None])).sum(dim=1)
    return place
