"""These tests run Triton's kernels: on a GPU where there is one, else in the interpreter, in a process of their own."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ssmpretrain.kernels.dispatch import is_interpreting

collect_ignore_glob = [] if is_interpreting() or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_interpreting():
        for item in items:
            if "kernels/triton/" in item.nodeid:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if is_interpreting() else "cuda")


@pytest.fixture(autouse=True)
def _rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to bfloat16 as GPUs do; by itself it cuts the last bits off."""
    if not is_interpreting():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast: Callable[..., Any] = InterpreterBuilder.cast_impl

    def cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = np.where(np.isnan(source.data), bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(rounded.astype(np.uint16), target.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_to_nearest)


@pytest.fixture(autouse=True)
def _masks_are_boolean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter take masks that a condition on numbers was joined to: Triton 3.9 makes integers of them."""
    if not is_interpreting():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def boolean(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), tl.int1)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_masked_load",
        lambda self, at, mask, *rest, **named: load(self, at, boolean(mask), *rest, **named),
    )
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_masked_store",
        lambda self, at, value, mask, *rest: store(self, at, value, boolean(mask), *rest),
    )


@pytest.fixture(autouse=True)
def _lengths_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton 3.6's interpreter count loops with numpy 2.4, which makes no number of an array of one element."""
    if not is_interpreting():
        return
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6"):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_item(tensor: Any, scope: Any) -> Any:
        result = patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        return result

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_item)


@pytest.fixture(autouse=True)
def _interpreter_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out two things that take half of the time of Triton 3.6's interpreter and cannot fail a test here.

    It prepares Triton's language anew at every call of a device function; once for each launch is enough. And it checks
    every sum and product of integers for an overflow of 32 bits, which tensors of this size do not reach.
    """
    if not is_interpreting():
        return
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6"):
        return
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    patch = interpreter._patch_lang
    patched: set[int] = set()  # modules whose names for the language are prepared, in this launch

    def patch_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        scope = patch(function)
        if not patched:  # the launch itself, which takes back what it prepared
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(module)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Cut sequences into chunks of 8 steps, so that a tiny one has several."""
    from ssmpretrain.kernels.gpu import scan

    monkeypatch.setattr(scan, "CHUNK", 8)
    yield 8


@pytest.fixture
def parallel_chunks(short_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the chunks of a sequence in parallel, as for long sequences in small batches."""
    from ssmpretrain.kernels.gpu import scan

    monkeypatch.setattr(scan, "_plan", lambda *_: (32, True))
