"""The joint_embedding suite: steps of DINO, iBOT and LeJEPA beside a step of MAE, with the same encoder and images.

Each step runs in a Lightning trainer as in `fit`, without reading data. All sides take turns. B images, px side.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.measure import allocated, peak_memory, synchronize
from ssmpretrain.objectives import DINO, MAE, LeJEPA, Objective
from ssmpretrain.training.optim.schedules import Cosine

ENCODERS = {"Vim-Ti": "vim_tiny_patch16_224", "VMamba-T": "vmamba_tiny_s1l8"}
_WHOLE_RUN = Cosine(warmup_epochs=0)
# The name of a method, the local views of an image (None for a single view), and its objective
METHODS: dict[str, tuple[int | None, Callable[[str], Objective]]] = {
    "MAE": (None, lambda name: MAE(name, decoder_embed_dim=512, decoder_depth=2, schedule=_WHOLE_RUN)),
    "DINO": (8, lambda name: DINO(name, schedule=_WHOLE_RUN)),
    "iBOT": (8, lambda name: DINO(name, ibot=1.0, num_prototypes=8192, schedule=_WHOLE_RUN)),
    "LeJEPA": (6, lambda name: LeJEPA(name, schedule=_WHOLE_RUN)),
}


def rows(
    device: torch.device, threads: int, B: int | None = None, px: int = 224, turns: int = 3
) -> list[dict[str, Any]]:
    """Run the suite and return a row for each encoder and method. The first method is what the others compare with.

    A CPU computes in float32; its time is processor time of all threads, and its memory the peak of a separate process
    above its idle memory. A GPU computes in bf16-mixed; its memory is the peak of PyTorch's allocator, with weights and
    states of the optimizer.

    Args:
        device: Device of the measurement.
        threads: Threads of a CPU.
        B: Images of a step; None for 8 on a CPU and 64 on a GPU.
        px: Side of the global views in pixels, a multiple of 64; local ones have 3/7 of it, rounded to 32.
        turns: Turns of each method; the fastest step counts.
    """
    B = B or (8 if device.type == "cpu" else 64)
    return [row for title, name in ENCODERS.items() for row in _rows_of(title, name, device, threads, B, px, turns)]


def _rows_of(
    title: str, name: str, device: torch.device, threads: int, B: int, px: int, turns: int
) -> Iterator[dict[str, Any]]:
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    memory: dict[str, float] = {}
    for turn in range(turns):
        for method in METHODS:
            run = steps(method, name, B, px, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times[method] += run()
            if device.type == "cuda":
                memory[method] = torch.cuda.max_memory_allocated(device) / 2**20
            elif turn == 0:
                arguments = (f"{method}:{name}", str(px), str(B), "--threads", str(threads))
                memory[method] = peak_memory("joint-embedding", *arguments)["above_idle_mib"]
            del run
            gc.collect()
            assert device.type == "cpu" or allocated(device) < 2**28
    first = next(iter(METHODS))
    for method in METHODS:
        yield {
            "encoder": title, "case": method, "images": B, "ms": min(times[method]), "mib": memory[method],
            "time_ratio": min(times[method]) / min(times[first]), "memory_ratio": memory[method] / memory[first],
        }  # fmt: skip


def steps(method: str, encoder: str, B: int, px: int, device: torch.device) -> Callable[[], list[float]]:
    """Return a function that trains for three steps and returns the milliseconds of the last two."""
    num_local, build = METHODS[method]
    objective, clock = build(encoder), _Clock(device)

    def run() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator=device.type, devices=1, max_steps=3, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[clock],
                precision="bf16-mixed" if device.type == "cuda" else "32-true",
            )  # fmt: skip
            trainer.fit(objective, _Repeated(B, px, num_local))
        return clock.times[1:]

    for name in ("lightning.pytorch", "ssmpretrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return run


class _Repeated(LightningDataModule):
    """The same batch of noise in every step: one view, or two global and some local ones."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, B: int, px: int, num_local: int | None) -> None:
        super().__init__()
        self.image_size, self.batch_size = px, B
        side = 32 * round(px * 3 / 7 / 32)
        if num_local is None:
            self.views, self.batch = None, {"image": torch.randn(B, 3, px, px)}
        else:
            self.views = [SimpleNamespace(size=px), SimpleNamespace(size=side)]
            views = [torch.randn(B, 2, 3, px, px), torch.randn(B, num_local, 3, side, side)]
            self.batch = {"views": views, "num_global": 2}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch] * 3, batch_size=None)  # type: ignore[arg-type]


class _Clock(Callback):
    """Take the milliseconds of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.now = device, time.process_time if device.type == "cpu" else time.perf_counter
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        synchronize(self.device)
        self.start = self.now()

    def on_train_batch_end(self, *_: Any) -> None:
        synchronize(self.device)
        self.times.append((self.now() - self.start) * 1e3)


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a table, one line each."""
    lines = [f"{'encoder':<10}{'step':<8}{'images/s':>10}{'ms':>9}{'of MAE':>8}{'MiB':>8}{'of MAE':>8}"]
    for row in rows:
        rate = row["images"] / row["ms"] * 1e3
        lines.append(
            f"{row['encoder']:<10}{row['case']:<8}{rate:>10.1f}{row['ms']:>9.0f}{row['time_ratio']:>8.2f}"
            f"{row['mib']:>8.0f}{row['memory_ratio']:>8.2f}"
        )
    return "\n".join(lines)
