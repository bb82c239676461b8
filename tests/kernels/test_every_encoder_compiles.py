"""Every kernel that a registered encoder launches, compiled for GPUs that are not here, within the limits of a GPU.

An encoder runs once on fake CUDA tensors, where operators compute nothing but shapes. Each operator that it calls then
runs on the meta device, forward and backward, and its launches are recorded and compiled. A new encoder or operator is
found by itself.
"""

import itertools
import multiprocessing
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

pytest.importorskip("triton")

import ssmpretrain
from ssmpretrain.kernels.add_norm import add_norm
from ssmpretrain.kernels.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.cross_scan import cross_selective_scan
from ssmpretrain.kernels.gpu.ahead_of_time import TARGETS, compile_launch, specialization_of
from ssmpretrain.kernels.gpu.launch import Launch, record_launches
from ssmpretrain.kernels.selective_scan import selective_scan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCHES = (128, 1)  # images: one launch over all channels; few programs, and chunks of long sequences in parallel
REGISTERS = {target: 255 if target.startswith("sm") else 256 for target in TARGETS}
CPU_SECONDS = 10


class Strided(NamedTuple):
    """A tensor without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    elements: int  # of its storage
    dtype: torch.dtype

    def on_meta(self) -> Tensor:
        """Return the tensor on the meta device."""
        storage = torch.empty(self.elements, dtype=self.dtype, device="meta")
        return storage.as_strided(self.shape, self.stride, self.offset)


class Call(NamedTuple):
    """An operator, its arguments with `Strided` for tensors, and whether it has a backward pass."""

    operator: str
    arguments: tuple[Any, ...]
    trains: bool


def _strided(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    elements = value.untyped_storage().size() // value.element_size()
    return Strided((*value.shape,), (*value.stride(),), int(value.storage_offset()), elements, value.dtype)


class _Calls(TorchDispatchMode):
    """Note the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Call] = {}
        self.training = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "ssmpretrain":
            call = Call(function._schema.name, tree_map(_strided, args), self.training)
            self.seen[repr(call)] = call
        return function(*args, **(kwargs or {}))


class _OnTheHost(TorchDispatchMode):
    """Run this package's operators on the meta device as on a GPU, up to the launches of their kernels."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "ssmpretrain":
            return OPDEFS[function._schema.name]._init_fn(*args)
        return function(*args, **(kwargs or {}))


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Turn autocast on for CUDA, which `torch.autocast` refuses where there is no GPU."""
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def encoder_calls(name: str) -> dict[str, Call]:
    """Return the operators that training and inference of an encoder call, once for each kind of arguments."""
    with torch.device("meta"):
        model: nn.Module = ssmpretrain.create_encoder(name, drop_path_rate=0.1)
    side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index, call-overload]
    with FakeTensorMode(allow_non_fake_inputs=True), _Calls() as calls:
        model = model.to_empty(device="cuda")
        for dtype, batch in itertools.product(DTYPES.values(), BATCHES):
            images = torch.empty(batch, 3, side, side, device="cuda")
            with _autocast(dtype):
                calls.training = True
                model.train()(images)
                calls.training = False
                with torch.no_grad():
                    model.eval()(images)
    return calls.seen


def operation_calls(dtype: torch.dtype) -> dict[str, Call]:
    """Return calls of the operations with arguments that no encoder gives them: most of all, without optional ones."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)

    with FakeTensorMode(), _Calls() as calls:
        for state in (1, 8, 16, 17, 32, 64):
            u, delta, z = (make(128, 197, 384, dtype=dtype).mT for _ in range(3))
            B, C = (make(128, state, 197, dtype=dtype) for _ in range(2))
            for absent in range(8) if state == 16 else (0, 7):
                D, bias, gate = (None if absent >> i & 1 else t for i, t in enumerate((make(384), make(384), z)))
                selective_scan(u, delta, make(384, state), B, C, D, gate, bias, delta_softplus=absent == 0)
        x = make(128, 197, 384, dtype=dtype).mT
        for bias, silu, taps in itertools.product((make(384), None), (True, False), (1, 2, 4)):
            causal_conv1d(x, make(384, taps), bias, activation="silu" if silu else None, reverse=silu)
        bidirectional_causal_conv1d(x, make(2, 384, 4))
        x = make(128, 197, 192, dtype=dtype)
        residuals, biases, scales = (x.float(), None), (make(192), None), (make(128).detach(), None)
        for residual, bias, scale, norm in itertools.product(residuals, biases, scales, ("rms", "layer")):
            add_norm(x, residual, make(192), bias, norm=norm, drop_path_scale=scale)
        for channels, rank, state in ((96, 6, 1), (384, 24, 1), (1024, 64, 1), (192, 6, 16)):
            x = make(32, 14, 14, channels, dtype=dtype).permute(0, 3, 1, 2)
            shapes = ((4, rank + 2 * state, channels), (4, channels, rank), (4, channels), (4, channels, state))
            for mode in ("cross", ("h", "w4", "w4_flip", "v_flip")):
                cross_selective_scan(x, *(make(*shape) for shape in shapes), make(4, channels), mode=mode)
    return calls.seen


def launches_of(call: Call) -> list[Launch]:
    """Return the launches of an operator and, where it trains, of its gradient."""
    arguments = tree_map_only(Strided, lambda t: t.on_meta(), call.arguments, is_leaf=lambda t: isinstance(t, Strided))
    if call.trains:
        tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), arguments)
    namespace, name = call.operator.split("::")
    with record_launches() as launches, _OnTheHost():
        outputs = getattr(getattr(torch.ops, namespace), name)(*arguments)
        if call.trains:
            outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.grad_fn is not None]
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return launches


@cache
def all_launches() -> list[Launch]:
    """Return a launch for every kernel and specialization that the encoders and the operations above ask for."""
    calls: dict[str, Call] = {}
    for name in ssmpretrain.list_encoders():
        calls |= encoder_calls(name)
    for dtype in DTYPES.values():
        calls |= operation_calls(dtype)
    launches: dict[Any, Launch] = {}
    for call in calls.values():
        for launch in launches_of(call):
            launches.setdefault(specialization_of(launch, "sm_90"), launch)
    return list(launches.values())


def fault_of(index: int, target: str) -> str | None:
    """Return what a GPU would refuse or pay for in a kernel, or None."""
    launch = all_launches()[index]
    name = f"{launch.kernel.fn.__name__} { ({k: v for k, v in launch.arguments.items() if k.isupper()}) }"
    before = _cpu_seconds()
    try:
        kernel = compile_launch(launch, target)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error)[-300:]}"
    seconds = _cpu_seconds() - before
    if kernel.spilled_bytes == 0 and kernel.registers <= REGISTERS[target] and seconds <= CPU_SECONDS:
        return None
    return f"{name}: {kernel.registers} registers, {kernel.spilled_bytes} bytes spilled, {seconds:.1f} s"


def _cpu_seconds() -> float:
    """Return the time of this process and of the assemblers that it started; waiting for others counts nothing."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or nothing is compiled, and takes no time
    indices = range(len(all_launches()))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        faults = list(pool.map(fault_of, indices, itertools.repeat(target)))
    assert indices
    assert [fault for fault in faults if fault] == []
