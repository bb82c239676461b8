"""All cases of the benchmarks: those of every module in `benchmarks.operations`, and whole models.

B batch, px pixels
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch

import ssmpretrain
from benchmarks import operations
from benchmarks.case import Case, ModelCase, OpCase

_BATCHES = {224: 256, 512: 64, 1248: 16}


def all_cases(suites: set[str], dtypes: list[torch.dtype], tiny: bool) -> list[Case]:
    """Return the cases of the suites. Cases with a target come first, so that a short budget reaches them.

    Args:
        suites: Some of "op", "block" and "model".
        dtypes: Types of operations and blocks. Models run in the first.
        tiny: Whether to use small sizes, for a dry run on a CPU.
    """
    chosen: list[Case] = []
    for dtype in dtypes:
        of_operations = list(_op_cases(dtype, tiny))
        chosen += [case for case in of_operations if case.has_target]
        chosen += _model_cases(dtype, tiny) if dtype == dtypes[0] else []
        chosen += [case for case in of_operations if not case.has_target]
    return [case for case in chosen if case.suite in suites]


def _op_cases(dtype: torch.dtype, tiny: bool) -> Iterator[OpCase]:
    """Yield the cases of every module in the folder `benchmarks.operations`."""
    for found in pkgutil.iter_modules(operations.__path__):
        module = importlib.import_module(f"{operations.__name__}.{found.name}")
        yield from module.tiny_cases(dtype) if tiny else module.full_cases(dtype)


def _model_cases(dtype: torch.dtype, tiny: bool) -> Iterator[ModelCase]:
    if tiny:
        yield ModelCase("test_vim", "test_vim", "test_vit", True, {"px": 64, "B": 2}, dtype)
        return

    def vim(title: str, family: str, name: str, px: int) -> ModelCase:
        encoder, rival = f"{family}_{name}_patch16_224", f"deit_{name}_patch16_224"
        compiled = name == "tiny" and px != 512  # compiling takes a minute
        return ModelCase(f"{title} {px}", encoder, rival, True, {"px": px, "B": _BATCHES[px]}, dtype, compiled)

    def vmamba(title: str, encoder: str) -> ModelCase:
        return ModelCase(title, encoder, "swin_tiny_patch4_window7_224", False, {"px": 224, "B": 128}, dtype)

    found = [vim("Vim-Ti", "vim", "tiny", 1248), vim("Vim2-Ti", "vim2", "tiny", 1248)]
    found += [vmamba("VMamba-T 224", "vmamba_tiny_s1l8"), vmamba("VMamba2-T 224", "vmamba2_tiny")]
    for size, short, pixels in (("tiny", "Ti", (224, 512)), ("small", "S", (1248, 224, 512))):
        for px in pixels:
            found += [vim(f"Vim-{short}", "vim", size, px), vim(f"Vim2-{short}", "vim2", size, px)]
    registered = set(ssmpretrain.list_encoders())
    yield from (case for case in found if case.encoder in registered)
