"""Linear layers that run on a CPU as the product that is fast on its processor.

PyTorch computes a linear layer on a CPU with MKL in float32 and with oneDNN in bfloat16. Two processors need another
way, and `ProcessorTraits` recognises them:

- **No bfloat16 products** (x86-64 without AVX-512): PyTorch then runs a plain loop of 4 to 9 GFLOP/s on a core that
  reaches 70 to 85 in float32 (measured on a Zen 3, 197 to 6085 tokens, 192 to 1536 channels, forward and backward). So
  the operands are converted to float32, and the result is rounded to bfloat16.
- **AMD with AVX-512**: MKL leaves half of it unused (measured on a Zen 4 with two threads, 96 to 384 channels of
  56 x 56 positions: 1.15 ms, and 0.52 ms as a 1 x 1 convolution, which oneDNN computes). On a Zen 3 both ways are
  equally fast forward, and the convolution is slower backward. With one thread PyTorch does not give 1 x 1 convolutions
  to oneDNN, and on an Intel processor they are slower than a linear layer.

The choice depends on the processor, the number of threads and the dtype, and on no timing, so a run that is repeated on
a machine gives the same bits. Compiled and exported models always contain a linear layer.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.encoders.layers.state_space import compute_dtype


class ProcessorTraits(NamedTuple):
    """What decides how a processor computes products of matrices.

    Attributes:
        has_bfloat16: Whether PyTorch has a fast bfloat16 product for it.
        prefers_convolution: Whether a 1 x 1 convolution is faster than a linear layer, in float32 with several threads.
    """

    has_bfloat16: bool
    prefers_convolution: bool

    @classmethod
    def of(cls, machine: str, vendor: str, instructions: Mapping[str, Any]) -> ProcessorTraits:
        """Return the traits of a processor.

        Args:
            machine: Name of the architecture, such as "x86_64", as `platform.machine` gives it.
            vendor: Identifier of the vendor, such as "AuthenticAMD"; empty if it is unknown.
            instructions: Names of instruction sets, as `torch.cpu.get_capabilities` gives them.
        """
        if machine.lower() not in ("x86_64", "amd64"):
            return cls(has_bfloat16=True, prefers_convolution=False)
        avx512 = all(instructions.get(f"avx512_{part}") for part in ("f", "bw", "dq", "vl"))
        # oneDNN's conditions for bfloat16; the second is AVX2 with conversions.
        has_bfloat16 = avx512 or bool(instructions.get("avx_ne_convert"))
        return cls(has_bfloat16, prefers_convolution=avx512 and vendor == "AuthenticAMD")


def _vendor() -> str:
    """Return the vendor of the processor on Linux; elsewhere an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


PROCESSOR = ProcessorTraits.of(platform.machine(), _vendor(), torch.cpu.get_capabilities())
"""The processor of this machine."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T + bias` like `torch.nn.functional.linear`, under autocast too.

    Args:
        x: Input, (..., D).
        weight: (E, D).
        bias: (E,), or None.

    Returns:
        y, (..., E), in autocast's dtype if autocast is on, else in the dtype of x and weight.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x, weight)
    if product_dtype(dtype) != dtype and _fits(x, weight):
        with torch.autocast("cpu", enabled=False):
            product = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return product.to(dtype)
    if _as_convolution(x, dtype):
        rows = x.reshape(1, -1, 1, x.shape[-1]) if x.ndim != 4 else x
        y = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
        return y if x.ndim == 4 else y.reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which this processor multiplies matrices of a dtype: float32 if it has no fast bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 and not PROCESSOR.has_bfloat16 else dtype


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether PyTorch multiplies x and weight; otherwise `F.linear` raises its error about their dtypes."""
    return x.dtype == weight.dtype or torch.is_autocast_enabled("cpu")


def _as_convolution(x: Tensor, dtype: torch.dtype) -> bool:
    suits = PROCESSOR.prefers_convolution and dtype == x.dtype == torch.float32 and x.numel() > 0
    return suits and not torch.compiler.is_compiling() and torch.get_num_threads() > 1


class Projection(nn.Linear):
    """A linear layer, (..., D) to (..., E), computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Compute fc2(gelu(fc1(x))) at each token or position, (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Projection(dim, hidden)
        self.fc2 = Projection(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
