"""A whole Vim block.

B batch, L tokens, D width of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.case import WIDTHS, OpCase, draw_normal, draw_projection, largest_batch
from benchmarks.networks import autocast
from ssmpretrain.encoders.vim.blocks import VimBlock, VimMixer


def vim_block_case(name: str, dtype: torch.dtype, *, D: int, L: int, B: int | None = None) -> OpCase:
    """Make a case of a whole Vim block on a float32 residual stream; below float32 under autocast."""
    B = B or largest_batch(2 * D, L, dtype)
    block = VimBlock(VimMixer(D), D)

    def make(random: torch.Generator) -> dict[str, Tensor]:
        weights = {key: value.detach().to(random.device) for key, value in block.named_parameters()}
        for key in weights:
            if "proj" in key and key.endswith("weight"):
                weights[key] = draw_projection(random, dtype, *weights[key].shape)
        return {
            "x": 0.1 * draw_normal(random, B, L, D),
            **weights,
        }  # smaller than the branch, so that errors of the branch show in y

    def run(x: Tensor, **weights: Tensor) -> Tensor:
        with autocast(x.device, torch.float32 if x.dtype == torch.float64 else dtype):
            return functional_call(block, weights, (x,))  # type: ignore[no-any-return]

    sizes = {"B": B, "L": L, "D": D, "E": 2 * D, "N": 16}
    parameters = frozenset(name for name, _ in block.named_parameters())
    return OpCase(
        *("block", "vim_block", f"Vim block {name} L={L}", sizes, dtype, make),
        *(parameters, run, run, 2 * B * L * 2 * D * 16),
    )


def tiny_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    yield vim_block_case("tiny", dtype, D=64, L=67, B=3)


def full_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for size, L in (("Ti", 197), ("Ti", 1025), ("S", 197)):
        yield replace(vim_block_case(size, dtype, D=WIDTHS[size], L=L), has_target=(size, L) == ("Ti", 197))
