"""Comparators: other implementations of the operations and encoders, and the reasons why one is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Function, ModelCase, OpCase
from benchmarks.measure import first_line
from benchmarks.networks import autocast

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FAMILIES = ("torch_ref", "mamba", "causal_conv1d", "vmamba", "deit", "swin", "test_vit")
"""Beginnings of the names of comparators."""

_LONGEST_LOOP = 256  # tokens; the definition is a Python loop over them


@dataclass(frozen=True)
class Comparator:
    """Another implementation of an operation.

    available: Whether it can run here, and otherwise the reason.
    arrange: Function that brings a case's inputs into the layout of the implementation. It is not timed.
    run: Function of the arranged inputs by name. It is timed.
    """

    name: str
    available: Callable[[], tuple[bool, str]]
    arrange: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    run: Function


@dataclass(frozen=True)
class Rival:
    """A way to run timm's encoder.

    context: Function that returns a context which chooses the attention backend.
    compiled: Whether the encoder runs under `torch.compile`.
    """

    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False


def of_op(case: OpCase) -> Iterator[Comparator]:
    """Yield the comparators of an operation or a block."""
    if case.suite == "op":
        yield Comparator("torch_ref", lambda: _short_enough(case), _unchanged, case.reference)
    if case.op == "selective_scan":
        yield Comparator("mamba", mamba_available, _contiguous, _mamba_scan)
    if case.op == "bidirectional_scan":
        yield Comparator("mamba", vim_available, _unchanged, _vim_mixer)
    if case.op == "vim_block":
        yield Comparator("mamba", vim_available, _unchanged, lambda **named: _vim_block(case.dtype, **named))
    if case.op == "causal_conv1d":
        yield Comparator("causal_conv1d", conv_available, _unchanged, _packaged_conv)
    if case.op == "add_norm":
        yield Comparator("mamba", _norm_available, _unchanged, _mamba_add_norm)
    if case.op == "cross_selective_scan":
        yield Comparator("vmamba", _vmamba_available, _unchanged, case.reference)


def of_model(case: ModelCase) -> dict[str, Rival]:
    """Return timm's encoder with each attention backend, and compiled if the case asks for it, by name."""
    rivals = {case.rival: Rival()}
    if case.backends:
        rivals = {
            f"{case.rival} {name}": Rival(lambda b=backend: sdpa_kernel(b))  # type: ignore[misc]
            for name, backend in BACKENDS.items()
        }
    return rivals | ({f"{case.rival} compiled": Rival(compiled=True)} if case.compiled else {})


def mamba_available() -> tuple[bool, str]:
    module = "mamba_ssm.ops.selective_scan_interface"
    present, why = _importable(module, "mamba-ssm")
    if present and getattr(importlib.import_module(module), "selective_scan_cuda", None) is None:
        return False, f"mamba-ssm {package_version('mamba-ssm')} is installed without its CUDA scan"
    return present, why


def conv_available() -> tuple[bool, str]:
    return _importable("causal_conv1d", "causal-conv1d")


def vim_available() -> tuple[bool, str]:
    """Return whether both packages that Vim's own mixer needs can be imported, and otherwise the reason."""
    for available in (mamba_available, conv_available):
        present, why = available()
        if not present:
            return False, why
    return True, ""


def _norm_available() -> tuple[bool, str]:
    return _importable("mamba_ssm.ops.triton.layer_norm", "mamba-ssm")


def _vmamba_available() -> tuple[bool, str]:
    return False, "VMamba's kernels are a CUDA extension inside its repository; there is no package to import"


def _importable(module: str, package: str) -> tuple[bool, str]:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as reason:  # absent, or built for another PyTorch
        return False, f"{package} cannot be imported: {first_line(reason)}"
    return True, ""


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _short_enough(case: OpCase) -> tuple[bool, str]:
    tokens = case.sizes.get("L") or case.sizes["H"] * case.sizes["W"]
    if "scan" in case.op and tokens > _LONGEST_LOOP:
        return False, f"the definition takes a step of Python a token; run up to {_LONGEST_LOOP} tokens"
    return True, ""


def _unchanged(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs


def _contiguous(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in inputs.items()}


def _mamba_scan(**named: Tensor) -> Tensor:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan(**named, delta_softplus=True)  # type: ignore[no-any-return]


def _packaged_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    return conv(x, weight.to(x.dtype), bias.to(x.dtype), activation="silu")  # type: ignore[no-any-return]


def _mamba_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    norm = importlib.import_module("mamba_ssm.ops.triton.layer_norm").rms_norm_fn
    return norm(x, weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True)  # type: ignore[no-any-return]


def _vim_mixer(xz: Tensor, **named: Tensor) -> Tensor:
    """Compute Vim's mixer with the two CUDA packages: convolution, projections and gated scan in both directions."""
    x, z = (half.mT.contiguous() for half in xz.chunk(2, dim=-1))
    ahead = _vim_direction(x, z, "forward", named)
    back = _vim_direction(x.flip(-1), z.flip(-1), "backward", named).flip(-1)
    return (0.5 * (ahead + back)).mT


def _vim_direction(x: Tensor, z: Tensor, which: str, named: dict[str, Tensor]) -> Tensor:
    p = {name.removeprefix(f"{which}_"): value for name, value in named.items() if name.startswith(which)}
    rank, state = p["dt_proj"].shape[1], p["A"].shape[1]
    u = _packaged_conv(x, p["conv_weight"], p["conv_bias"])
    projected = p["x_proj"].to(x.dtype) @ u
    dt, B, C = torch.split(projected, [rank, state, state], dim=1)
    return _mamba_scan(
        u=u, delta=p["dt_proj"].to(x.dtype) @ dt, A=p["A"], B=B.contiguous(), C=C.contiguous(), D=p["D"], z=z,
        delta_bias=p["dt_bias"],
    )  # fmt: skip


def _vim_block(dtype: torch.dtype, x: Tensor, **weights: Tensor) -> Tensor:
    """Compute Vim's block with this mixer: RMSNorm, projections in and out, float32 residual stream."""
    w = {name.removeprefix("mixer."): value for name, value in weights.items()}
    named: dict[str, Tensor] = {}
    for which, end in (("forward", ""), ("backward", "_b")):
        named |= {
            f"{which}_conv_weight": w[f"conv1d{end}.weight"].squeeze(1), f"{which}_conv_bias": w[f"conv1d{end}.bias"],
            f"{which}_x_proj": w[f"x_proj{end}.weight"], f"{which}_dt_proj": w[f"dt_proj{end}.weight"],
            f"{which}_dt_bias": w[f"dt_proj{end}.bias"], f"{which}_D": w[f"D{end}"],
            f"{which}_A": -torch.exp(w["A_log" if not end else "A_b_log"]),
        }  # fmt: skip
    with autocast(x.device, dtype):
        xz = F.linear(F.rms_norm(x, x.shape[-1:], w["norm.weight"], 1e-5), w["in_proj.weight"])
        return x + F.linear(_vim_mixer(xz, **named), w["out_proj.weight"])
