"""Compiled blocks of the encoder, on a GPU as CUDA graphs."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of

_log = logging.getLogger(__name__)

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_GRAPHS_OF_A_BLOCK = 8  # training and validation, sizes of views; PyTorch's limit is for all blocks together


class CompileEncoder(Callback):
    """Compile each block of the encoder with `torch.compile` when training begins.

    Names of parameters, and so checkpoints, are those of a run without it. A run may be continued with or without it
    if --allow_changes is given, because sums are rounded differently and drop path draws other blocks. What surrounds
    the blocks stays as it is: patch embedding, masks, decoders, heads, teachers.

    A block is compiled once for each shape of its input, and again for validation. The first step takes minutes.

    Args:
        mode: Mode of `torch.compile`. "reduce-overhead" and "max-autotune" replay the kernels of a block as one CUDA
            graph, which saves time where a GPU waits for Python: small encoders, small batches. They keep the memory of
            every graph. "default" fuses operations and needs no GPU.
        backend: Backend of `torch.compile`. Another one than "inductor" takes no mode, so `mode` must be "default".

    Raises:
        UserError: If an argument is unknown, the mode needs a GPU, the strategy shards the encoder, or the blocks of
            the encoder cannot be compiled one by one.
    """

    def __init__(self, mode: Mode = "reduce-overhead", backend: str = "inductor") -> None:
        if mode not in get_args(Mode):
            raise UserError(f"CompileEncoder: mode is one of {', '.join(get_args(Mode))}; got {mode!r}.")
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise UserError(f"CompileEncoder: backend is one of {', '.join(known)}; got {backend!r}. Use inductor.")
        if backend != "inductor" and mode != "default":
            raise UserError(f"CompileEncoder: mode {mode} belongs to inductor; got backend {backend!r}. Leave it out.")
        self.mode, self.backend = mode, backend

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device.type
        if self.mode in _WITH_GRAPHS and device != "cuda":
            raise UserError(
                f"CompileEncoder: mode {self.mode} runs CUDA graphs and needs a CUDA GPU; got {device}. Set mode: "
                "default, or train on a GPU."
            )
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"CompileEncoder: each process has the whole encoder; got {type(trainer.strategy).__name__}, which "
                "shards it. Use --trainer.strategy ddp, or leave CompileEncoder out."
            )
        blocks = _blocks(pl_module)
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, _GRAPHS_OF_A_BLOCK * len(blocks)
        )
        mode = None if self.backend != "inductor" else self.mode
        for block in blocks:
            # in place: a wrapper would change the names of the parameters
            block.compile(fullgraph=True, dynamic=False, backend=self.backend, mode=mode)
        rank_zero_only(_log.info)("compiling %d blocks, mode %s; the first step takes minutes", len(blocks), self.mode)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode in _WITH_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # results of the last step may be overwritten


def _blocks(pl_module: LightningModule) -> list[nn.Module]:
    encoder: Any = getattr(pl_module, "encoder", None)
    blocks = [] if encoder is None else family_of(encoder).compilable_blocks(encoder)
    if not blocks:
        name = type(pl_module if encoder is None else encoder).__name__
        raise UserError(
            f"CompileEncoder: compiles blocks that are called one after the other, as those of Vim, VMamba, ARM and "
            f"ViT; got {name}, which has no such blocks. Leave CompileEncoder out."
        )
    return blocks
