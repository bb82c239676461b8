"""Tensors in shards over several ranks, as FSDP2 keeps them: this rank's rows, and the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor in shards, as a view; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_to_save(value: Any) -> Tensor | None:
    """Return this rank's rows of a tensor in shards, on the CPU; None for anything else."""
    return local(value).cpu() if isinstance(value, DTensor) else None


def gathered(value: Any, keep: bool) -> Any:
    """Return nested dicts and lists with their tensors whole and on the CPU, gathered one after another.

    Args:
        value: The same nest on every rank, and every rank calls this.
        keep: Whether this rank is to have the tensors that were in shards; it gets None for them otherwise.
    """
    if isinstance(value, dict):
        return {name: gathered(inner, keep) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([gathered(inner, keep) for inner in value])
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    return value


def in_shards_like(value: Any, target: Any) -> Any:
    """Shard a whole tensor, the same on every rank, like `target`; return it as it is if their shapes differ."""
    fits = isinstance(value, Tensor) and isinstance(target, DTensor) and value.shape == target.shape
    if not fits or isinstance(value, DTensor):
        return value
    whole = value.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)  # each cuts its own
