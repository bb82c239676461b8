"""Which operations and models are measured, at which sizes.

B batch, L tokens, E channels, D width of a block, N states, R rank of the step size, K routes, H x W map, px pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.networks import autocast
from ssmpretrain.encoders.vim.blocks import VimBlock, VimMixer
from ssmpretrain.kernels.add_norm import add_norm, add_norm_reference
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan, bidirectional_scan_reference
from ssmpretrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from ssmpretrain.kernels.cross_scan import cross_selective_scan, cross_selective_scan_reference
from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference

Function = Callable[..., Any]  # of named tensors, to a tensor or several
FORWARD, BOTH = "forward", "forward+backward"
INFERENCE, TRAINING = "inference", "training step"

_WIDTHS = {"Ti": 192, "S": 384}  # D of Vim; E = 2 D, R = D / 16
_LENGTHS = (197, 6085, 1025)  # tokens of 224, 1248 and 512 pixels, the ones with a target first
_STAGES = {1: (96, 56), 2: (192, 28), 3: (384, 14), 4: (768, 7)}  # VMamba-T at 224 pixels: E, and H = W
_BATCHES = {224: 256, 512: 64, 1248: 16}
_BYTES = 1.25e9  # u, delta, z and y of a case together, at most: far beyond the L2 cache


@dataclass(frozen=True)
class OpCase:
    """An operation on tensors of one size: what is timed, and the definition that it is checked against.

    suite: "op" or "block".
    op: Which operation; comparators are found by it.
    name: The case for a person.
    sizes: B, L and the like, for the record.
    dtype: Of activations. Parameters are float32, as under autocast.
    make: Draws fresh inputs, by name, on the generator's device.
    parameters: Those without a batch axis. The first axis of every other input and of every output is the batch.
    run: Ours.
    reference: The definition in PyTorch, which computes in float64 when its inputs are float64.
    updates: State updates of one forward pass, each of them an exponential.
    """

    suite: str
    op: str
    name: str
    sizes: dict[str, int]
    dtype: torch.dtype
    make: Callable[[torch.Generator], dict[str, Tensor]] = field(repr=False)
    parameters: frozenset[str] = field(repr=False)
    run: Function = field(repr=False)
    reference: Function = field(repr=False)
    updates: int = 0
    modes: tuple[str, str] = (FORWARD, BOTH)


@dataclass(frozen=True)
class ModelCase:
    """One of our encoders against one of timm's, at the same number of pixels.

    rival: timm's name. Its attention runs once with each SDPA backend if `backends`, else with PyTorch's choice.
    """

    name: str
    encoder: str
    rival: str
    backends: bool
    sizes: dict[str, int]
    dtype: torch.dtype
    suite: str = "model"
    op: str = "model"
    modes: tuple[str, str] = (INFERENCE, TRAINING)


Case = OpCase | ModelCase


def all_cases(suites: set[str], dtypes: list[torch.dtype], tiny: bool) -> list[Case]:
    """Cases of these suites, those that have a target first, so that a short budget reaches them.

    Args:
        suites: Of "op", "block" and "model".
        dtypes: Of operations and blocks. Models run in the first.
        tiny: Sizes for a dry run on a CPU.
    """
    chosen: list[Case] = []
    for dtype in dtypes:
        batches = [_tiny_cases(dtype)] if tiny else [_first_op_cases(dtype), _other_op_cases(dtype)]
        models = _model_cases(dtype, tiny) if dtype == dtypes[0] else []
        chosen += [*batches[0], *models, *(case for batch in batches[1:] for case in batch)]
    return [case for case in chosen if case.suite in suites]


def _tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield selective_scan_case("tiny", dtype, E=40, L=67, B=3)
    yield bidirectional_scan_case("tiny", dtype, E=40, R=5, L=67, B=3)
    yield causal_conv1d_case("tiny", dtype, E=40, L=67, B=3)
    yield add_norm_case("tiny", dtype, D=40, L=67, B=3)
    yield cross_selective_scan_case("tiny", dtype, E=40, H=7, R=5, N=1, B=3)
    yield cross_selective_scan_case("tiny, N = 16", dtype, E=40, H=7, R=5, N=16, B=3)
    yield vim_block_case("tiny", dtype, D=64, L=67, B=3)


def _first_op_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    E, H = _STAGES[1]
    for L in _LENGTHS[:2]:
        yield selective_scan_case("Ti", dtype, E=2 * _WIDTHS["Ti"], L=L)
    yield cross_selective_scan_case("VMamba-T stage 1", dtype, E=E, H=H, R=E // 16, N=1)
    yield vim_block_case("Ti", dtype, D=_WIDTHS["Ti"], L=197)


def _other_op_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, D in _WIDTHS.items():
        for L in _LENGTHS:
            if (size, L) not in (("Ti", 197), ("Ti", 6085)):
                yield selective_scan_case(size, dtype, E=2 * D, L=L)
            yield bidirectional_scan_case(size, dtype, E=2 * D, R=D // 16, L=L)
    for size, L in (("Ti", 6085), ("S", 197)):
        yield causal_conv1d_case(size, dtype, E=2 * _WIDTHS[size], L=L)
        yield add_norm_case(size, dtype, D=_WIDTHS[size], L=L)
    for stage, (E, H) in _STAGES.items():
        if stage > 1:
            yield cross_selective_scan_case(f"VMamba-T stage {stage}", dtype, E=E, H=H, R=E // 16, N=1)
    yield cross_selective_scan_case("VMamba-T v0 stage 3", dtype, E=768, H=14, R=24, N=16)
    for size, L in (("Ti", 1025), ("S", 197)):
        yield vim_block_case(size, dtype, D=_WIDTHS[size], L=L)


def _model_cases(dtype: torch.dtype, tiny: bool) -> Iterator[ModelCase]:
    if tiny:
        yield ModelCase("test_vim", "test_vim", "test_vit", True, {"px": 64, "B": 2}, dtype)
        return

    def vim(short: str, name: str, px: int) -> ModelCase:
        encoder, rival = f"vim_{name}_patch16_224", f"deit_{name}_patch16_224"
        return ModelCase(f"Vim-{short} {px}", encoder, rival, True, {"px": px, "B": _BATCHES[px]}, dtype)

    yield vim("Ti", "tiny", 1248)
    yield ModelCase(
        *("VMamba-T 224", "vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"), False, {"px": 224, "B": 128}, dtype
    )
    for px in (224, 512):
        yield vim("Ti", "tiny", px)
    for px in (1248, 224, 512):
        yield vim("S", "small", px)


def selective_scan_case(name: str, dtype: torch.dtype, *, E: int, L: int, N: int = 16, B: int | None = None) -> OpCase:
    """Everything a Mamba block gives a scan, channels next to each other in memory."""
    B = B or _batch(E, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(_normal, random)
        u, delta, z = (normal(B, L, E, dtype=dtype).mT for _ in range(3))
        rows = normal(B, L, 2 * N, dtype=dtype).mT
        return {
            "u": u, "delta": delta, "A": _decay(random, E, N), "B": rows[:, :N], "C": rows[:, N:],
            "D": normal(E), "z": z, "delta_bias": _dt_bias(random, E),
        }  # fmt: skip

    parameters = frozenset({"A", "D", "delta_bias"})
    run, reference = (partial(scan, delta_softplus=True) for scan in (selective_scan, selective_scan_reference))
    sizes = {"B": B, "L": L, "E": E, "N": N}
    return OpCase(
        *("op", "selective_scan", f"selective_scan {name} L={L}", sizes, dtype, make),
        *(parameters, run, reference, B * L * E * N),
    )


def bidirectional_scan_case(
    name: str, dtype: torch.dtype, *, E: int, R: int, L: int, N: int = 16, B: int | None = None
) -> OpCase:
    """The core of Vim's mixer, both directions."""
    B = B or _batch(E, L, dtype)
    names = [f"{which}_{name}" for which in ("forward", "backward") for name in ScanDirection._fields]

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal, projection = partial(_normal, random), partial(_projection, random, dtype)

        def direction() -> ScanDirection:
            return ScanDirection(
                *(0.5 * normal(E, 4), 0.1 * normal(E), projection(R + 2 * N, E), projection(E, R)),
                *(_dt_bias(random, E), _decay(random, E, N), normal(E)),
            )

        inputs = {"xz": normal(B, L, 2 * E, dtype=dtype)}
        return inputs | dict(zip(names, [*direction(), *direction()], strict=True))

    def of_named(function: Function) -> Function:
        def run(xz: Tensor, **named: Tensor) -> Tensor:
            ordered = [named[name] for name in names]
            result: Tensor = function(xz, ScanDirection(*ordered[:7]), ScanDirection(*ordered[7:]))
            return result

        return run

    run, reference = of_named(bidirectional_scan), of_named(bidirectional_scan_reference)
    sizes = {"B": B, "L": L, "E": E, "N": N, "R": R}
    return OpCase(
        *("op", "bidirectional_scan", f"bidirectional_scan {name} L={L}", sizes, dtype, make),
        *(frozenset(names), run, reference, 2 * B * L * E * N),
    )


def causal_conv1d_case(name: str, dtype: torch.dtype, *, E: int, L: int, B: int | None = None) -> OpCase:
    """One direction's convolution with SiLU, channels next to each other in memory."""
    B = B or _batch(E, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(_normal, random)
        return {"x": normal(B, L, E, dtype=dtype).mT, "weight": 0.5 * normal(E, 4), "bias": 0.1 * normal(E)}

    run, reference = (partial(conv, activation="silu") for conv in (causal_conv1d, causal_conv1d_reference))
    sizes = {"B": B, "L": L, "E": E, "W": 4}
    return OpCase(
        *("op", "causal_conv1d", f"causal_conv1d {name} L={L}", sizes, dtype, make),
        *(frozenset({"weight", "bias"}), run, reference),
    )


def add_norm_case(name: str, dtype: torch.dtype, *, D: int, L: int, B: int | None = None) -> OpCase:
    """Residual sum and RMSNorm between two blocks."""
    B = B or _batch(D, L, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal = partial(_normal, random)
        return {"x": normal(B, L, D, dtype=dtype), "residual": normal(B, L, D), "weight": 1 + 0.1 * normal(D)}

    sizes = {"B": B, "L": L, "D": D}
    return OpCase(
        *("op", "add_norm", f"add_norm {name} L={L}", sizes, dtype, make),
        *(frozenset({"weight"}), add_norm, add_norm_reference),
    )


def cross_selective_scan_case(
    name: str, dtype: torch.dtype, *, E: int, H: int, R: int, N: int, B: int | None = None
) -> OpCase:
    """The core of VMamba's SS2D on a square map, channels next to each other in memory."""
    K = 4
    B = B or _batch(E, H * H, dtype)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        normal, projection = partial(_normal, random), partial(_projection, random, dtype)
        return {
            "x": normal(B, H, H, E, dtype=dtype).permute(0, 3, 1, 2), "x_proj": projection(K, R + 2 * N, E),
            "dt_proj": projection(K, E, R), "dt_bias": _dt_bias(random, K, E), "A": _decay(random, K, E, N),
            "D": normal(K, E),
        }  # fmt: skip

    parameters = frozenset({"x_proj", "dt_proj", "dt_bias", "A", "D"})
    sizes = {"B": B, "H": H, "W": H, "E": E, "N": N, "R": R, "K": K}
    return OpCase(
        *("op", "cross_selective_scan", f"cross_selective_scan {name}", sizes, dtype, make),
        *(parameters, cross_selective_scan, cross_selective_scan_reference, K * B * H * H * E * N),
    )


def vim_block_case(name: str, dtype: torch.dtype, *, D: int, L: int, B: int | None = None) -> OpCase:
    """A whole Vim block on a float32 stream, under autocast below float32."""
    B = B or _batch(2 * D, L, dtype)
    block = VimBlock(VimMixer(D), D)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        weights = {key: value.detach().to(random.device) for key, value in block.named_parameters()}
        for key in weights:
            if "proj" in key and key.endswith("weight"):
                weights[key] = _projection(random, dtype, *weights[key].shape)
        return {"x": 0.1 * _normal(random, B, L, D), **weights}  # small beside the branch, so that y shows its errors

    def run(x: Tensor, **weights: Tensor) -> Tensor:
        with autocast(x.device, torch.float32 if x.dtype == torch.float64 else dtype):
            return functional_call(block, weights, (x,))  # type: ignore[no-any-return]

    sizes = {"B": B, "L": L, "D": D, "E": 2 * D, "N": 16}
    parameters = frozenset(name for name, _ in block.named_parameters())
    return OpCase(
        *("block", "vim_block", f"Vim block {name} L={L}", sizes, dtype, make),
        *(parameters, run, run, 2 * B * L * 2 * D * 16),
    )


def _batch(channels: int, tokens: int, dtype: torch.dtype) -> int:
    """The largest power of two with which four activations of a sequence stay below _BYTES."""
    fitting = int(_BYTES / (4 * channels * tokens * dtype.itemsize))
    return 1 << (fitting.bit_length() - 1)


def _normal(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=random, device=random.device, dtype=dtype)


def _projection(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """A matrix (..., out, in) in float32 with numbers that dtype holds too: every implementation rounds it so."""
    return (_normal(random, *shape) / math.sqrt(shape[-1])).to(dtype).float()


def _decay(random: torch.Generator, *shape: int) -> Tensor:
    """A = -1..-N along the last axis as Mamba starts, moved by up to a tenth."""
    states = torch.arange(1, shape[-1] + 1, dtype=torch.float32, device=random.device)
    return -states * (1 + 0.1 * torch.rand(*shape, generator=random, device=random.device))


def _dt_bias(random: torch.Generator, *shape: int) -> Tensor:
    """softplus of it is log-uniform in about [0.001, 0.1], as Mamba starts."""
    return -6.9 + 4.6 * torch.rand(*shape, generator=random, device=random.device)
