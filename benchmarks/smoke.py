"""The smoke suite: the scan against plain PyTorch, masked pretraining, and memory and time over the length, on the CPU.

Both sides of a ratio run in turn in one process. Minima are compared, because the machine may be shared.

B batch, E channels, N states, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import interleaved, peak_memory
from benchmarks.networks import images, inference, masked_model, network, pretraining_step
from ssmpretrain.kernels.selective_scan import selective_scan
from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs

VIM, DEIT = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
LENGTHS = {197: 224, 1025: 512, 6085: 1248, 24965: 2528}  # tokens with the class token: pixels


def rows(threads: int) -> list[dict[str, Any]]:
    """Run the whole suite, which takes a few minutes, and return its rows. The encoders suite times the encoders."""
    return [*scan_rows(), masked_row(), memory_row(threads), memory_per_image_row(threads), *length_rows(threads)]


def compare(case: str, ours: dict[str, float], theirs: dict[str, float], target: str, note: str) -> dict[str, Any]:
    """Return a row with the speed-up of our side by minimum and by median; above 1 our side is faster."""
    return {
        "case": case, "ours": ours, "theirs": theirs, "speed_up": theirs["min_ms"] / ours["min_ms"],
        "speed_up_median": theirs["median_ms"] / ours["median_ms"], "target": target, "note": note,
    }  # fmt: skip


def scan_rows() -> Iterator[dict[str, Any]]:
    """Time the scan beside PyTorch: forward beside a loop over time, with gradients beside the chunks.

    The backward pass of the loop is not timed: autograd fills a tensor of the whole length for every step, so the loop
    takes a time quadratic in the length, which says nothing about a scan.
    """
    for B in (1, 8):
        for backward, other, target, turns in ((False, "loop", ">= 60", 10), (True, "chunks", "none", 5)):
            ours, theirs = (scan_inputs(B, 384, 16, 197, backward) for _ in range(2))
            expected = scan(other, theirs, False)()
            error = float((scan("cpu", ours, False)() - expected).norm() / expected.norm())
            assert error <= 1e-5, f"the scan is wrong by {error}; its speed does not matter"
            runs = {"cpu": scan("cpu", ours, backward), other: scan(other, theirs, backward)}
            times = interleaved(runs, turns, calls=2)
            name = f"scan forward{' + backward' if backward else ''}, batch {B}"
            yield compare(name, times["cpu"], times[other], target, f"PyTorch {other}, E384 N16 L197")


def masked_row() -> dict[str, Any]:
    runs = {method: pretraining_step(masked_model(method), [images(16, 224)]) for method in ("mae", "simmim")}
    times = interleaved(runs, 3)
    return compare("VMamba-T 224 MAE step", times["mae"], times["simmim"], "none", "SimMIM, 60 % hidden, batch 16")


def memory_row(threads: int) -> dict[str, Any]:
    vim, deit = (peak_memory("train", name, "224", "8", "--threads", str(threads)) for name in (VIM, DEIT))
    return {
        "case": "Vim-Ti 224 training peak memory", "ours": vim, "theirs": deit, "target": "<= 1.3",
        "ratio": vim["peak_mib"] / deit["peak_mib"], "ratio_above_idle": vim["above_idle_mib"] / deit["above_idle_mib"],
        "note": "process peak; DeiT-Ti, batch 8, AdamW",
    }  # fmt: skip


def memory_per_image_row(threads: int) -> dict[str, Any]:
    """Measure the memory that one more image adds to a pretraining step, which leaves out weights and optimizer."""
    added = {}
    for method in ("mae", "simmim"):
        few, many = (peak_memory("pretrain", method, "224", B, "--threads", str(threads)) for B in ("8", "24"))
        added[method] = {"peak_mib": (many["peak_mib"] - few["peak_mib"]) / 16}
    return {
        "case": "VMamba-T 224 MAE memory per image", "ours": added["mae"], "theirs": added["simmim"], "target": "none",
        "ratio": added["mae"]["peak_mib"] / added["simmim"]["peak_mib"],
        "note": "process peak, batch 24 less batch 8; SimMIM, 60 % hidden",
    }  # fmt: skip


def length_rows(threads: int) -> Iterator[dict[str, Any]]:
    """Measure time and memory of Vim-Ti inference over the number of tokens, and fit exponents of power laws."""
    vim = network(VIM, 224)
    times, memory = {}, {}
    for length, pixels in LENGTHS.items():
        turns = 5 if length < 5000 else 1
        times[length] = interleaved({"vim": inference(vim, [images(1, pixels)])}, turns)["vim"]["min_ms"]
        memory[length] = peak_memory("infer", VIM, str(pixels), "1", "--threads", str(threads))["above_idle_mib"]
    for what, values in (("time (ms)", times), ("memory above idle (MiB)", memory)):
        yield {
            "case": f"Vim-Ti {what} over L", "values": values, "exponent": exponent(values), "target": "about 1",
            "exponent_last": exponent(dict(list(values.items())[-2:])), "note": f"L = {', '.join(map(str, values))}",
        }  # fmt: skip


def exponent(values: dict[int, float]) -> float:
    """Fit the slope of log(value) over log(length) by least squares: 1 means linear, 2 quadratic."""
    x = [math.log(length) for length in values]
    y = [math.log(max(value, 1e-3)) for value in values.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def scan_inputs(B: int, E: int, N: int, L: int, requires_grad: bool) -> list[Tensor]:
    """Draw u, delta, A, B, C, D, z and delta_bias like those of a Mamba block, with a fixed seed."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    decay = -torch.arange(1, N + 1, dtype=torch.float32).expand(E, N).contiguous()
    inputs = [normal(B, E, L), normal(B, E, L), decay, normal(B, N, L), normal(B, N, L), normal(E), normal(B, E, L)]
    inputs.append(normal(E) - 4)
    return [tensor.requires_grad_(requires_grad) for tensor in inputs]


def scan(impl: str, inputs: list[Tensor], backward: bool) -> Callable[[], Tensor]:
    """Return a function that runs a selective scan with softplus, skip, bias, gate; `backward` adds all gradients."""
    u, delta, A, B, C, D, z, bias = inputs

    def run() -> Tensor:
        if impl == "chunks":
            y, _ = scan_in_chunks(ScanInputs(u, delta, A, B, C, D, z, bias, True, False))
        else:
            y = loop_scan(*inputs) if impl == "loop" else selective_scan(u, delta, A, B, C, D, z, bias, True)
        if backward:
            y.sum().backward()  # type: ignore[no-untyped-call]
        return y.detach()

    return run if backward else torch.no_grad()(run)


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """Compute the scan by a simple Python loop over time, with all decays computed before and one einsum per step."""
    delta = nn.functional.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->beln", delta, A))
    drive = torch.einsum("bel,bnl,bel->beln", delta, B, u)
    state = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, C[:, :, t]))
    y = torch.stack(outputs, dim=2) + u * D[:, None]
    return y * nn.functional.silu(z)


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a table, one line each."""
    lines = [f"{'case':<38}{'ours':>11}{'theirs':>11}{'result':>18}  {'target':<10}against"]
    for row in rows:
        if "speed_up" in row:
            cells = [
                f"{row['ours']['min_ms']:.2f} ms",
                f"{row['theirs']['min_ms']:.2f} ms",
                f"{row['speed_up']:.2f}x as fast",
            ]
        elif "ratio" in row:
            cells = [
                f"{row['ours']['peak_mib']:.0f} MiB",
                f"{row['theirs']['peak_mib']:.0f} MiB",
                f"{row['ratio']:.2f}x",
            ]
        else:
            first, *_, last = row["values"].values()
            cells = [f"{first:.0f}", f"{last:.0f}", f"exponent {row['exponent']:.2f}"]
        lines.append(f"{row['case']:<38}{cells[0]:>11}{cells[1]:>11}{cells[2]:>18}  {row['target']:<10}{row['note']}")
    return "\n".join(lines)
