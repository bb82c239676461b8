"""The dense suite: time and memory of the maps of one image over its size, Vim and VMamba beside DeiT and Swin.

px side of the square image in pixels
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import allocated, peak_device_memory, peak_memory, synchronize
from benchmarks.networks import images, maps, maps_and_gradients
from benchmarks.smoke import exponent

ENCODERS = {
    "Vim-Ti": "vim_tiny_patch16_224",
    "DeiT-Ti": "deit_tiny_patch16_224",
    "VMamba-T": "vmamba_tiny_s1l8",
    "Swin-T": "swin_tiny_patch4_window7_224",
}
SIDES = (512, 1024, 1536, 2048)
_MODES: dict[str, Callable[[str, Tensor], Callable[[], Any]]] = {"maps": maps, "maps-train": maps_and_gradients}
_ON_CPU = {"maps": SIDES, "maps-train": SIDES[:2]}  # a training step of a large image takes minutes there


def rows(device: torch.device, threads: int, sides: dict[str, tuple[int, ...]] | None = None) -> list[dict[str, Any]]:
    """Run the whole suite and return a row for each mode and encoder.

    A CPU computes in float32, and its memory is the peak of a separate process above its idle memory. A GPU computes
    under autocast to bfloat16, and its memory is that of PyTorch's allocator above weights and image.

    Args:
        device: Device of the measurement.
        threads: Threads of a CPU.
        sides: Sides in pixels for each mode, "maps" (inference) and "maps-train" (forward and backward); None for all
            that are practical on the device.
    """
    sides = sides or (_ON_CPU if device.type == "cpu" else dict.fromkeys(_MODES, SIDES))
    return [_row(device, threads, mode, title, sides[mode]) for mode in sides for title in ENCODERS]


def _row(device: torch.device, threads: int, mode: str, title: str, sides: tuple[int, ...]) -> dict[str, Any]:
    name, milliseconds, mib = ENCODERS[title], {}, {}
    for px in sides:
        before = allocated(device)
        run = _MODES[mode](name, images(1, px, device))
        weights = allocated(device)
        milliseconds[px] = min(_timed(device, run))
        peak = peak_device_memory(device, run, weights)
        if peak is None:
            mib[px] = peak_memory(mode, name, str(px), "1", "--threads", str(threads))["above_idle_mib"]
        else:
            mib[px] = peak / 2**20
        del run
        assert device.type == "cpu" or allocated(device) <= before + 2**20
    pixels = {px * px: value for px, value in milliseconds.items()}
    memory = {px * px: value for px, value in mib.items()}
    return {
        "mode": mode, "case": title, "encoder": name, "ms": milliseconds, "mib": mib,
        "exponent_ms": exponent(pixels), "exponent_mib": exponent(memory),
    }  # fmt: skip


def _timed(device: torch.device, run: Callable[[], Any]) -> Iterator[float]:
    """Yield the milliseconds of two calls after one that is not timed; only one of calls above five seconds."""
    run()
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken = (time.perf_counter() - start) * 1e3
        yield taken
        if taken > 5000:
            return


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as two tables: milliseconds and MiB by side, and exponents over the number of pixels."""
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        sides = list(of_mode[0]["ms"])
        lines.append(f"{mode:<12}" + "".join(f"{f'{px} px':>18}" for px in sides) + f"{'exponents':>14}")
        for row in of_mode:
            cells = "".join(f"{row['ms'][px]:>9.0f} ms{row['mib'][px]:>6.0f} M" for px in sides)
            lines.append(f"{row['case']:<12}{cells}{row['exponent_ms']:>8.2f}{row['exponent_mib']:>6.2f}")
    return "\n".join(lines)
