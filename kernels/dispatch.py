"""What every operation decides at its boundary: which implementation runs, and which dtypes and devices go together."""

import importlib.util
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.transforms import is_jit_tracing, is_transformed

Impl = Literal["auto", "reference", "cpu", "triton"]
Implementation = Literal["triton", "native", "chunked", "traced", "reference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, because torch.compile cannot trace the search


def choose_implementation(op: str, x: Tensor, impl: str, others: Iterable[Tensor | None] = ()) -> Implementation:
    """Return what runs `op` on x.

    Args:
        op: The operation's name, which opens the messages.
        x: The main input, whose device and dtype decide.
        impl: What the caller wants.
        others: The other inputs that have derivatives.

    Returns:
        "triton" on CUDA tensors; "native", the C++ library, on CPU tensors, or "chunked", eager PyTorch, where it
        cannot be built and where inputs carry more than a kernel knows of (`is_transformed`); "traced", which leaves
        PyTorch's own operations alone in the graph, where `torch.export` traces them; "reference", plain PyTorch, in
        float64 and on every other device; on the meta device the native library's operator, which computes nothing.

    Raises:
        ValueError: If impl is unknown, or names an implementation that cannot run here.
    """
    if impl not in get_args(Impl):
        raise UserError(f"{op}: impl is one of {', '.join(get_args(Impl))}; got {impl!r}")
    device = x.device.type
    transformed = is_transformed((x, *others))
    if transformed and impl in ("cpu", "triton"):
        raise UserError(
            f"{op}: impl={impl!r} has values and gradients; got tensors under forward mode or a transform of "
            f"torch.func. Use impl='auto', which runs plain PyTorch there."
        )
    if impl == "cpu" and device != "cpu":
        raise UserError(f"{op}: impl='cpu' takes CPU tensors; got {x.device}. Move them, or use impl='auto'.")
    if impl == "triton":
        _check_triton(op, x)
        return "triton"
    if impl == "reference" or x.dtype == torch.float64:
        return "reference"
    if transformed:
        return "chunked"
    if device == "cpu" and _is_exporting():
        return "traced"
    if device == "cpu":
        return "native" if library.is_available() else "chunked"
    if device == "cuda" and _HAS_TRITON:
        return "triton"
    if device == "meta":
        return "native"  # its operator knows shapes and FLOPs without a library
    _warn_slow_reference(op, device)
    return "reference"


def keeps_states(inputs: Iterable[Tensor | None]) -> bool:
    """Return whether a scan keeps what its backward pass starts from; always in a graph of `torch.jit.trace`."""
    if is_jit_tracing():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast changes nothing; none under `torch.export`, which would keep it as a node, and on the
    meta device, which has no autocast."""
    return nullcontext() if device == "meta" or _is_exporting() else torch.autocast(device, enabled=False)


def _is_exporting() -> bool:
    """Return whether `torch.export` is running the code to trace it; what `torch.compile` traces is something else."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_interpreting() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check_triton(op: str, x: Tensor) -> None:
    if not _HAS_TRITON:
        raise UserError(f"{op}: impl='triton' needs the package triton, which is not installed. Use impl='auto'.")
    if x.dtype == torch.float64:
        raise UserError(f"{op}: impl='triton' computes in float32; got float64. Use impl='reference'.")
    if x.device.type != ("cpu" if is_interpreting() else "cuda"):
        raise UserError(
            f"{op}: impl='triton' takes CUDA tensors; got {x.device}. Move them, use impl='auto', or, to check a "
            f"kernel on the CPU, start Python with TRITON_INTERPRET=1."
            if not is_interpreting()
            else f"{op}: impl='triton' takes CPU tensors under TRITON_INTERPRET=1; got {x.device}."
        )


@cache
def _warn_slow_reference(op: str, device: str) -> None:
    reason = "Triton is not installed" if device == "cuda" else f"there is no kernel for {device}"
    warnings.warn(
        f"{op}: {reason}; running the reference in plain PyTorch, which is right but slow. CUDA with Triton and the "
        f"CPU have fast ones.",
        stacklevel=4,
    )


def check_dtypes_and_devices(op: str, named: tuple[tuple[str, Tensor | None], ...]) -> None:
    """Raise unless every tensor is on the first one's device, A is float32 and the dtypes are ones we compute with.

    Args:
        op: The operation's name, which opens the message.
        named: (name, tensor) pairs, the main input first. If that is float64, everything is.
    """
    first_name, first = named[0]
    assert first is not None
    double = first.dtype == torch.float64
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise UserError(
                f"{op}: all tensors are on one device; got {first_name} on {first.device} and {name} on {tensor.device}"
            )
        if double and tensor.dtype != torch.float64:
            raise UserError(f"{op}: with a float64 {first_name} every input is float64; got {name} in {tensor.dtype}")
        if double:
            continue
        if name.rpartition(".")[2] == "A":
            if tensor.dtype != torch.float32:
                raise UserError(
                    f"{op}: {name} is float32, because the decay is computed from it; got {tensor.dtype}. "
                    f"Keep it in float32 (autocast does)."
                )
        elif tensor.dtype not in _DTYPES:
            raise UserError(f"{op}: {name} is float32, bfloat16 or float16; got {tensor.dtype}")
