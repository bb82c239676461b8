"""The boundary of every operation: the choice of implementation, and the checks of dtypes and devices."""

import importlib.util
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.transforms import inside_transform, is_jit_tracing

Impl = Literal["auto", "reference", "cpu", "triton"]
Implementation = Literal["triton", "native", "chunked", "exported", "reference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, because torch.compile cannot trace the search


def choose_implementation(op: str, x: Tensor, impl: str, inputs: Iterable[object] = ()) -> Implementation:
    """Return which implementation of an operation runs.

    Args:
        op: The operation's name, which opens the messages.
        x: The main input, whose device and dtype decide.
        impl: The caller's choice, one of `Impl`.
        inputs: All inputs; those that are not tensors are skipped.

    Returns:
        - "triton" for CUDA tensors.
        - "native", the C++ library, for CPU tensors. Also on the meta device, where its operator computes nothing.
        - "chunked", eager PyTorch, on the CPU if the library cannot be built, and for inputs with derivatives that no
          kernel computes (`is_transformed`).
        - "exported", PyTorch's own operations in few nodes of a graph, on the CPU while `torch.export` traces.
        - "reference", plain PyTorch, in float64, for an empty batch and on every other device.

    Raises:
        ValueError: If impl is unknown, or names an implementation that cannot run here.
    """
    if impl not in get_args(Impl):
        raise UserError(f"{op}: impl is one of {', '.join(get_args(Impl))}; got {impl!r}. Give one of them.")
    device = x.device.type
    transformed = is_transformed((x, *inputs))
    if transformed and impl in ("cpu", "triton"):
        raise UserError(
            f"{op}: impl={impl!r} has values and gradients; got tensors under forward mode or a transform of "
            f"torch.func. Use impl='auto', which runs plain PyTorch there."
        )
    if impl == "cpu" and device != "cpu":
        raise UserError(f"{op}: impl='cpu' takes CPU tensors; got {x.device}. Move them, or use impl='auto'.")
    if impl == "triton":
        _check_triton(op, x)
    if impl == "reference" or x.dtype == torch.float64 or x.shape[0] == 0:  # a kernel cannot start for an empty batch
        return "reference"
    if impl == "triton":
        return "triton"
    if transformed:
        return "chunked"
    if device == "cpu" and _is_exporting():
        return "exported"
    if device == "cpu":
        return "native" if library.is_available() else "chunked"
    if device == "cuda" and _HAS_TRITON:
        return "triton"
    if device == "meta":
        return "native"  # its operator knows shapes and FLOPs without a library
    _warn_slow_reference(op, device)
    return "reference"


def is_transformed(inputs: Iterable[object]) -> bool:
    """Return whether a tensor has a tangent (forward mode) or belongs to a transform such as grad, vmap or jvp.

    While `torch.compile` traces, every tensor inside a transform counts. Inputs that are not tensors are skipped.
    """
    if torch.compiler.is_dynamo_compiling():
        return bool(inside_transform())
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(isinstance(t, Tensor) and (is_wrapped(t) or _has_tangent(t)) for t in inputs)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def keeps_states(inputs: Iterable[object]) -> bool:
    """Return whether a scan keeps states for its backward pass. In a graph of `torch.jit.trace` it always does.

    Args:
        inputs: All inputs; those that are not tensors are skipped.
    """
    if is_jit_tracing():
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast.

    The context does nothing under `torch.export`, which would keep it as a node, and on the meta device, which has no
    autocast.
    """
    return nullcontext() if device == "meta" or _is_exporting() else torch.autocast(device, enabled=False)


def _is_exporting() -> bool:
    """Return whether `torch.export` is tracing the code; False while `torch.compile` traces it."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""
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
            else f"{op}: impl='triton' takes CPU tensors under TRITON_INTERPRET=1; got {x.device}. Move them."
        )


@cache
def _warn_slow_reference(op: str, device: str) -> None:
    reason = "Triton is not installed" if device == "cuda" else f"there is no kernel for {device}"
    warnings.warn(
        f"{op}: {reason}; running the reference in plain PyTorch, which is right but slow. CUDA with Triton and the "
        f"CPU have fast ones.",
        stacklevel=4,
    )


def check_tensors(op: str, needed: Mapping[str, object], optional: Mapping[str, object] | None = None) -> None:
    """Raise unless every input is a tensor; a kernel would read memory that is not there.

    Args:
        op: The operation's name, which opens the message.
        needed: Inputs by name.
        optional: Inputs by name that may be None instead.
    """
    for name, value in {**needed, **(optional or {})}.items():
        if isinstance(value, Tensor) or (value is None and name not in needed):
            continue
        holds = "a tensor" if name in needed else "a tensor or None"
        raise UserError(
            f"{op}: {name} is {holds}; got {'None' if value is None else type(value).__name__}. Give a tensor."
        )


def check_dtypes_and_devices(op: str, named: Iterable[tuple[str, object]]) -> None:
    """Raise unless all tensors are on one device, A and A_backward are float32 and the other dtypes are supported.

    Args:
        op: The operation's name, which opens the message.
        named: (name, input) pairs, the main input first. If that is float64, all tensors must be. Inputs that are not
            tensors are skipped.
    """
    tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
    first_name, first = tensors[0]
    double = first.dtype == torch.float64
    for name, tensor in tensors:
        if tensor.device != first.device:
            raise UserError(
                f"{op}: all tensors are on one device; "
                f"got {first_name} on {first.device} and {name} on {tensor.device}. "
                f"Move them to one."
            )
        if double and tensor.dtype != torch.float64:
            raise UserError(
                f"{op}: with a float64 {first_name} every input is float64; got {name} in {tensor.dtype}. Convert it."
            )
        if double:
            continue
        if name.rpartition(".")[2] in ("A", "A_backward"):
            if tensor.dtype != torch.float32:
                raise UserError(
                    f"{op}: {name} is float32, because the decay is computed from it; got {tensor.dtype}. "
                    f"Keep it in float32 (autocast does)."
                )
        elif tensor.dtype not in _DTYPES:
            raise UserError(f"{op}: {name} is float32, bfloat16 or float16; got {tensor.dtype}. Convert it.")
