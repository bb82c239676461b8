"""A case of the benchmarks: an operation or a model at one size, and the random draw of its inputs.

B batch, L tokens, E channels, D width of a block, N states, R rank of the step size, K routes, H x W map, px pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]  # from named tensors to one tensor or several
FORWARD, BOTH = "forward", "forward+backward"
INFERENCE, TRAINING = "inference", "training step"

WIDTHS = {"Ti": 192, "S": 384}  # D of Vim; E = 2 D, R = D / 16
LENGTHS = (197, 6085, 1025)  # tokens of images of 224, 1248 and 512 pixels; those with a target come first
STAGES = {1: (96, 56), 2: (192, 28), 3: (384, 14), 4: (768, 7)}  # VMamba-T at 224 pixels: E, and H = W
BYTES = 1.25e9  # greatest size of u, delta, z and y of a case together; far more than the L2 cache holds


@dataclass(frozen=True)
class OpCase:
    """An operation on tensors of one size: the function to time, and the definition to check it against.

    suite: "op" or "block".
    op: Name of the operation, by which its comparators are found.
    name: Name of the case in tables.
    sizes: Sizes such as B and L, for the record.
    dtype: Type of activations. Parameters are float32, as under autocast.
    make: Function that draws fresh inputs, by name, on the generator's device.
    parameters: Names of inputs without a batch axis. The first axis of every other input and output is the batch.
    run: Implementation of this project.
    reference: The definition in PyTorch, which computes in float64 when its inputs are float64.
    updates: State updates of one forward pass. Each takes one exponential.
    token_axis: Axis of the tokens, or of the rows of a map, in every input that is no parameter.
    has_target: Whether the project has set a target for the case. A short budget measures such cases first.
    cancelling: Names of inputs whose gradient is a sum over tokens of terms that nearly cancel, such as a decay that
        serves a whole head. Its rounding is small beside the terms, and larger beside the sum.
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
    token_axis: int = 1
    has_target: bool = False
    cancelling: frozenset[str] = field(default=frozenset(), repr=False)
    modes: tuple[str, str] = (FORWARD, BOTH)


@dataclass(frozen=True)
class ModelCase:
    """An encoder of this project against one of timm, with the same number of pixels.

    rival: Name of timm's encoder. If `backends` is true, its attention runs with each SDPA backend, otherwise with
        PyTorch's choice.
    compiled: Whether timm's encoder runs under `torch.compile` too.
    """

    name: str
    encoder: str
    rival: str
    backends: bool
    sizes: dict[str, int]
    dtype: torch.dtype
    compiled: bool = False
    suite: str = "model"
    op: str = "model"
    modes: tuple[str, str] = (INFERENCE, TRAINING)


Case = OpCase | ModelCase


def largest_batch(channels: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the largest power of two with which four activations of a sequence stay below BYTES."""
    fitting = int(BYTES / (4 * channels * tokens * dtype.itemsize))
    return 1 << (fitting.bit_length() - 1)


def draw_normal(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=random, device=random.device, dtype=dtype)


def draw_projection(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw a matrix (..., out, in) in float32 and round it to dtype, so that all implementations see equal numbers."""
    return (draw_normal(random, *shape) / math.sqrt(shape[-1])).to(dtype).float()


def draw_decay(random: torch.Generator, *shape: int) -> Tensor:
    """Draw A: the initial values of Mamba, -1 to -N along the last axis, changed by up to a tenth."""
    states = torch.arange(1, shape[-1] + 1, dtype=torch.float32, device=random.device)
    return -states * (1 + 0.1 * torch.rand(*shape, generator=random, device=random.device))


def draw_dt_bias(random: torch.Generator, *shape: int) -> Tensor:
    """Draw a bias whose softplus is log-uniform in about [0.001, 0.1], the initial values of Mamba."""
    return -6.9 + 4.6 * torch.rand(*shape, generator=random, device=random.device)
