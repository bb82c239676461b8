"""Embeddings of images and their captions: computed over ranks, written to one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.whole_files import replacing
from ssmpretrain.commands.shared.two_towers import TwoTowers
from ssmpretrain.evaluation.retrieval import Retrieval


@dataclass
class Embedded:
    """Embeddings of this rank: images with labels and keys, and captions with the indices of their images."""

    retrieval: Retrieval
    image: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    owner: list[Tensor] = field(default_factory=list)
    num_captions: int = 0
    cut: int = 0


def embed(towers: TwoTowers, batches: Iterable[Mapping[str, Any]]) -> Embedded:
    """Encode the images of this rank, and their captions if there are any."""
    width = towers.encode_text(towers.tokenizer([""])[0]).shape[1]
    found = Embedded(Retrieval(width))
    for batch in batches:
        image, before = towers.encode_image(batch["image"]).cpu(), len(found.keys)
        found.image.append(image)
        found.label.append(batch.get("label", torch.full((len(image),), -1)).cpu())
        found.keys += batch.get("key", [""] * len(image))
        if "text" in batch:
            found.cut += int(batch["cut"].sum())
            text, owner = towers.encode_text(batch["tokens"]).cpu(), batch["owner"].cpu()
            found.retrieval.add(image, text, owner)
            found.text.append(text)
            found.owner.append(owner + before)
            found.num_captions += len(text)
    return found


def save_embeddings(path: Path, found: Embedded, towers: TwoTowers, more: Mapping[str, NDArray[Any]]) -> None:
    """Write embeddings, scale and bias to an npz file without pickled objects.

    Every rank calls this, and rank 0 writes. The file has the arrays `image_embeddings` (N, E), `labels` (N,) with -1
    for none, `keys` (N,), `text_embeddings` (T, E), `text_owner` (T,) with the row of the image of each caption,
    `logit_scale`, the factor of the cosine similarities, and `logit_bias`, which is added to them.

    Args:
        path: The .npz file.
        found: Embeddings of this rank.
        towers: Model that computed the embeddings.
        more: Further arrays by name.
    """
    width = found.retrieval.parts()[0].shape[1]
    empty, none = torch.empty(0, width), torch.empty(0, dtype=torch.int64)
    first = sum(ranks.gather(len(found.keys))[: ranks.rank()])
    owner = torch.cat([none, *found.owner]) + first
    parts = {"image_embeddings": torch.cat([empty, *found.image]), "labels": torch.cat([none, *found.label])}
    parts |= {"text_embeddings": torch.cat([empty, *found.text]), "text_owner": owner}
    rows = {name: ranks.gather_rows(part, 0) for name, part in parts.items()}
    keys = list(chain(*ranks.gather(found.keys)))
    if ranks.rank() > 0:
        return
    scale, bias = towers.scale_and_bias()
    arrays: dict[str, Any] = {name: torch.cat(part).numpy() for name, part in rows.items()}
    arrays |= {"keys": np.asarray(keys), "logit_scale": np.asarray(scale), "logit_bias": np.asarray(bias), **more}
    with replacing(path) as file:
        np.savez(file, **arrays)
