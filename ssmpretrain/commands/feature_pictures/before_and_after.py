"""The pictures of a training: neighbours and coloured maps by the encoder before and after it, in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks.saved_figures import save_figure
from ssmpretrain.commands.feature_pictures.coloured_maps import colour_maps
from ssmpretrain.commands.feature_pictures.component_sheet import draw_components
from ssmpretrain.commands.feature_pictures.images import Picture, Pictured, pictured
from ssmpretrain.commands.feature_pictures.neighbour_search import search
from ssmpretrain.commands.feature_pictures.neighbour_sheet import draw_neighbours
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.encoders.features.pooled import Pooled, pooled_features

_QUERIES, _NEIGHBOURS, _IMAGES = 5, 8, 8
_PATCHES = 8  # along the shorter side of a map, for a picture that shows places
_CANDIDATES = 100  # images among which queries of different classes are chosen


def draw_before_and_after(
    before: nn.Module,
    after: nn.Module,
    pooled: Pooled,
    data: Any,
    folder: RunFolder,
    names: Mapping[str, str],
    bank: int,
) -> list[Path]:
    """Draw `plots/neighbours.png` and `plots/pca.png` of a run, and return their paths.

    The queries and the coloured images are validation images, the neighbours training images without augmentation. Of
    an encoder with stages, the coloured map is the last one with at least 8 patches along the shorter side, because the
    last map of a small image may have only 2 x 2 patches; the title names the stage.

    Args:
        before, after: The encoder without training, and as it was trained, on one device; they are set to evaluation.
        pooled: Kind of features whose neighbours are drawn, as `Objective.pooled`.
        data: Data module with `bank_dataloader(limit)`, `val_dataloader(limit)`, `mean` and `std`.
        folder: Folder of the run.
        names: Words for the weights of "before" and "after", for the titles.
        bank: Number of training images to search, evenly spread.
    """
    encoders = {"before": before.eval(), "after": after.eval()}
    headings = {word: f"{word}: {names[word]}" for word in encoders}
    queries = list(_of_different_classes(pictured(data.val_dataloader(limit=_CANDIDATES), data), _QUERIES))
    bank_images = list(pictured(data.bank_dataloader(limit=bank), data))  # decoded once for both
    found = [
        search(word, headings[word], _vectors(encoder, pooled), queries, bank_images, _NEIGHBOURS)
        for word, encoder in encoders.items()
    ]
    title = f"Nearest neighbours of {len(found[0].rows)} unseen images among {found[0].searched:,} training images"
    save_figure(draw_neighbours(found, title), folder.neighbours)

    images = list(pictured(data.val_dataloader(limit=_IMAGES), data))
    stage = _stage_of_maps(after, images[0][0])
    maps = [colour_maps(word, headings[word], _maps(encoder, stage), images) for word, encoder in encoders.items()]
    pictures = [picture for _, part in images for picture in part]
    title = f"Patch features of {len(pictures)} unseen images"
    if stage is not None:
        title += f", stage {stage + 1} of {len(cast(Any, after).feature_info)}"
    save_figure(draw_components(pictures, maps, title), folder.components)
    return [path for path in (folder.neighbours, folder.components) if path.exists()]


def _vectors(encoder: nn.Module, pooled: Pooled) -> Callable[[Tensor], Tensor]:
    return _frozen(encoder, lambda images: pooled_features(encoder, images, [pooled])[pooled])


def _stage_of_maps(encoder: nn.Module, images: Tensor) -> int | None:
    """Return the number of the stage whose map is fine enough to look at; None for the last map."""
    reductions = [int(info["reduction"]) for info in cast(Any, encoder).feature_info]
    fine = [one for one in reductions if min(images.shape[-2:]) // one >= _PATCHES]
    chosen = max(fine, default=min(reductions))
    stage = len(reductions) - 1 - reductions[::-1].index(chosen)
    return None if stage == len(reductions) - 1 else stage


def _maps(encoder: nn.Module, stage: int | None) -> Callable[[Tensor], Tensor]:
    if stage is None:
        return _frozen(encoder, lambda images: encode(encoder, images).map)
    options = {"indices": [stage], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    return _frozen(encoder, lambda images: cast(Any, encoder).forward_intermediates(images, **options)[0])


def _frozen(encoder: nn.Module, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves images to the device of the encoder and computes without gradients."""
    device = next(encoder.parameters()).device

    def frozen(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return compute(images.to(device))

    return frozen


def _of_different_classes(images: Pictured, count: int) -> Iterator[tuple[Tensor, list[Picture]]]:
    """Yield up to `count` images, in order, of as many different classes as possible."""
    every = [(batch[row : row + 1], [picture]) for batch, pictures in images for row, picture in enumerate(pictures)]
    seen: dict[str | None, int] = {}
    turns = []
    for number, (_, (picture,)) in enumerate(every):
        turns.append((seen.get(picture.label, 0), number))  # the first of each class come before the second
        seen[picture.label] = seen.get(picture.label, 0) + 1
    for _, number in sorted(sorted(turns)[:count], key=lambda turn: turn[1]):
        yield every[number]
