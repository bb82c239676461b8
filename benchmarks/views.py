"""Rows of the data suite: several views of an image beside one view, and the kernels of hue and blur.

Each row is processor time on one core. All sides take turns in one process. Decoding counts once per image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import random_state_kept
from ssmpretrain.datamodules import ImageFolder, ViewGroup
from ssmpretrain.datamodules.decoding import colours
from ssmpretrain.datamodules.decoding.decode import decode_rgb
from ssmpretrain.datamodules.decoding.photometric import Photometric

_BICUBIC = v2.InterpolationMode.BICUBIC
_CALLS = 20  # of a kernel, in a row
_SIGMA = 1.05  # the mean of DINO's range


def rows(jpegs: list[bytes], turns: int) -> list[dict[str, Any]]:
    """Return the rows for these JPEG images."""
    return [*view_rows(jpegs, turns), *kernel_rows(decode_rgb(jpegs[0]), turns)]


def dino_views(coloured: bool = True) -> list[ViewGroup]:
    """Return DINO's two global views of 224 pixels and eight local ones of 96, with or without its colours."""

    def group(count: int, *options: Any, blur: float, solarize: float = 0.0) -> ViewGroup:
        policy = Photometric(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, blur, (0.1, 2.0), solarize)
        return ViewGroup(count, *options, None, policy if coloured else None)

    return [
        group(1, 224, (0.4, 1.0), False, blur=1.0),
        group(1, 224, (0.4, 1.0), False, blur=0.1, solarize=0.2),
        group(8, 96, (0.05, 0.4), True, blur=0.5),
    ]


def view_rows(jpegs: list[bytes], turns: int) -> Iterator[dict[str, Any]]:
    """Time decoded, augmented and normalised batches of one view, and of 2 + 8 views."""
    sides = {
        "one view of 224": partial(_batch, None, jpegs),
        "2 + 8 views of 224 and 96, crops": partial(_batch, dino_views(coloured=False), jpegs),
        "2 + 8 views, DINO's colours": partial(_batch, dino_views(), jpegs),
        "the same by torchvision's classes": partial(_torchvision_batch, _torchvision_views(), jpegs),
    }
    for case, (milliseconds, ratio) in _in_turn(sides, turns, len(jpegs)).items():
        note = f"per image, decoding included: {1e3 / milliseconds:,.0f} images a second and core; ratio to one view"
        yield {"case": case, "ours_ms": milliseconds, "ratio": ratio, "note": note}


def kernel_rows(image: Tensor, turns: int) -> Iterator[dict[str, Any]]:
    """Time hue and blur of one view beside torchvision's, one by one and on a batch of eight views."""
    for side in (224, 96):
        view = F.resize(image, [side, side], _BICUBIC).contiguous()
        batch = view.expand(8, -1, -1, -1).contiguous()
        kernels: dict[str, dict[str, Callable[[], Any]]] = {
            "hue": {
                "ours": lambda view=view: colours.turn_hue(view, 0.05),  # type: ignore[misc]
                "torchvision": lambda view=view: F.adjust_hue(view, 0.05),  # type: ignore[misc]
                "batch of 8": lambda batch=batch: F.adjust_hue(batch, 0.05),  # type: ignore[misc]
            },
            "blur": {
                "ours": lambda view=view: colours.blur(view, _SIGMA),  # type: ignore[misc]
                "torchvision": lambda view=view: F.gaussian_blur(view, [13, 13], [_SIGMA]),  # type: ignore[misc]
                "batch of 8": lambda batch=batch: F.gaussian_blur(batch, [13, 13], [_SIGMA]),  # type: ignore[misc]
            },
            "brightness": {
                "torchvision": lambda view=view: F.adjust_brightness(view, 1.2),  # type: ignore[misc]
                "batch of 8": lambda batch=batch: F.adjust_brightness(batch, 1.2),  # type: ignore[misc]
            },
        }
        for kind, runs in kernels.items():
            for name, (milliseconds, ratio) in _in_turn(runs, turns, 1, calls=_CALLS).items():
                views = 8 if "batch" in name else 1
                case = f"{kind} of {side} px, {name}"
                yield {"case": case, "ours_ms": milliseconds / views, "ratio": ratio / views, "note": "ms per view"}


def _batch(views: list[ViewGroup] | None, jpegs: list[bytes]) -> Any:
    """Decode JPEG images and make the batch that a data module with these views makes."""
    batcher = ImageFolder("images", image_size=224, views=views)._train_batcher
    with random_state_kept():
        decoded: list[Any] = [{"image": decode_rgb(jpeg), "label": 0, "key": ""} for jpeg in jpegs]
        return batcher.collate([batcher.prepare(one, 0, str(number)) for number, one in enumerate(decoded)])


def _torchvision_views() -> list[v2.Compose]:
    """Return the transform of each of DINO's views, from torchvision's classes."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=_BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    globals_ = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    return [*globals_, *[view(96, (0.05, 0.4), 0.5, 0.0)] * 8]


def _torchvision_batch(views: list[v2.Compose], jpegs: list[bytes]) -> list[Tensor]:
    with random_state_kept():
        images = [[view(image) for view in views] for image in map(decode_rgb, jpegs)]
    return [torch.stack([torch.stack(one[part]) for one in images]) for part in (slice(2), slice(2, None))]


def _in_turn(
    runs: dict[str, Callable[[], Any]], turns: int, count: int, calls: int = 1
) -> dict[str, tuple[float, float]]:
    """Return the least processor time for each of `count` images, in ms, and the median ratio to the first side."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            run()  # fills the caches with the data of this side
            start = time.process_time()
            for _ in range(calls):
                run()
            times[name].append((time.process_time() - start) * 1e3 / count / calls)
    first = next(iter(times.values()))
    return {
        name: (min(spent), median(mine / base for mine, base in zip(spent, first, strict=True)))
        for name, spent in times.items()
    }
