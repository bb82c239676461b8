"""The encoders suite: encoders of this package beside timm's on a CPU, inference and training steps, in one process.

All encoders of a group run in turn, and minima are compared, because the machine may be shared. Each row names dtype,
threads, batch, and whether the encoder is compiled. px pixels
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ssmpretrain
from benchmarks.case import INFERENCE, TRAINING
from benchmarks.measure import first_line, interleaved
from benchmarks.networks import images, inference, network, training_step

PIXELS = (224, 512, 1248, 2048)
_TURNS = {224: 10, 512: 5, 1248: 2}  # by pixels; larger images have one


@dataclass(frozen=True)
class Group:
    """Encoders that take turns: ours, and one of timm's, which the ratios compare them with.

    targets: Largest time of an encoder in a mode at a size, relative to timm's, in float32 and in bfloat16.
    """

    ours: tuple[str, ...]
    rival: str
    pixels: tuple[int, ...]
    targets: dict[tuple[str, str, int], tuple[float, float]]


_VIM, _VIM2, _VMAMBA2 = "vim_tiny_patch16_224", "vim2_tiny_patch16_224", "vmamba2_tiny"
GROUPS = (
    Group(
        (_VIM2, _VIM),
        "deit_tiny_patch16_224",
        PIXELS,
        {
            (_VIM2, TRAINING, 224): (1.2, 1.2),
            (_VIM2, INFERENCE, 1248): (1 / 6, 1 / 3),
            (_VIM2, INFERENCE, 2048): (1 / 10, 1 / 5),
            (_VIM, TRAINING, 224): (1.5, 1.5),
        },
    ),
    Group(
        (_VMAMBA2, "vmamba_tiny_s1l8"),
        "swin_tiny_patch4_window7_224",
        (224,),
        {(_VMAMBA2, mode, 224): (0.7, 0.7) for mode in (INFERENCE, TRAINING)},
    ),
)


def rows(
    threads: int,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    pixels: Sequence[int] = PIXELS,
    compiled: bool = False,
    groups: Sequence[Group] = GROUPS,
) -> Iterator[dict[str, Any]]:
    """Measure each group at each size and dtype: inference on one image, and at 224 pixels a training step on eight.

    Args:
        threads: Threads of the process, for the record.
        dtypes: float32, or a dtype of autocast.
        pixels: Sides of the images.
        compiled: Whether every encoder runs under `torch.compile` too.
        groups: Groups to measure.
    """
    for group in groups:
        for px in (one for one in pixels if one in group.pixels):
            for dtype in dtypes:
                for mode in (INFERENCE, TRAINING) if px == min(group.pixels) else (INFERENCE,):
                    yield from _group_rows(group, px, dtype, mode, compiled, threads)


def _group_rows(
    group: Group, px: int, dtype: torch.dtype, mode: str, compiled: bool, threads: int
) -> Iterator[dict[str, Any]]:
    B = 1 if mode == INFERENCE else 8
    registered = set(ssmpretrain.list_encoders())
    names = [group.rival, *(name for name in group.ours if name in registered)]
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in names:
        for state in ("eager", "compiled") if compiled else ("eager",):
            encoder = network(name, px)
            start = inference if mode == INFERENCE else training_step
            run = start(torch.compile(encoder) if state == "compiled" else encoder, [images(B, px)], dtype)  # type: ignore[arg-type]
            try:
                run()  # compiles, and makes the optimizer's state
            except RuntimeError as reason:
                yield _row(name, state, px, dtype, mode, B, threads) | {"absent": first_line(reason)}
                continue
            runs[name, state] = run
    named = {" ".join(key): run for key, run in runs.items()}
    times = interleaved(named, _TURNS.get(px, 1) if mode == INFERENCE else 3)
    for name, state in runs:
        ours = times[f"{name} {state}"]
        row = _row(name, state, px, dtype, mode, B, threads) | ours
        if name != group.rival:
            row["ratios"] = {
                other: ours["min_ms"] / time["min_ms"] for other, time in times.items() if other != f"{name} {state}"
            }
            limits = group.targets.get((name, mode, px))
            if limits and state == "eager":
                limit = limits[dtype != torch.float32]
                row |= {"target": limit, "reached": row["ratios"][f"{group.rival} eager"] <= limit}
        yield row
    gc.collect()


def _row(name: str, state: str, px: int, dtype: torch.dtype, mode: str, B: int, threads: int) -> dict[str, Any]:
    return {
        "case": name, "state": state, "px": px, "dtype": str(dtype).split(".")[1], "mode": mode, "batch": B,
        "threads": threads,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows, one line each: the time, and the time relative to the other encoders of the group."""
    return "\n".join(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    what = f"{row['px']} px {row['mode']}, batch {row['batch']}, {row['dtype']}, threads {row['threads']}"
    line = f"{_short(row['case'])} {row['state']}, {what}: "
    if "absent" in row:
        return f"{line}absent, {row['absent']}"
    line += f"{row['min_ms']:.1f} ms"
    ratios = [f"{ratio:.2f} of {_short(other)}" for other, ratio in row.get("ratios", {}).items()]
    line += f" = {', '.join(ratios)}" if ratios else ""
    if "target" in row:
        line += f"; target {row['target']:.2f} {'reached' if row['reached'] else 'MISSED'}"
    return line


def _short(name: str) -> str:
    return name.replace("_patch16_224", "").replace("_patch4_window7_224", "")
