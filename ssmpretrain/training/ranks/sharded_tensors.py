"""Sharded tensors, as FSDP2 keeps them over several ranks: the rows of this rank, and the whole tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, as a view. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_to_save(value: Any) -> Tensor | None:
    """Return this rank's rows of a sharded tensor, on the CPU; None for any other value."""
    return local(value).cpu() if isinstance(value, DTensor) else None


def gathered(value: Any, keep: bool) -> Any:
    """Gather the sharded tensors in nested dicts and lists, one after another, as whole tensors on the CPU.

    Every rank must call this.

    Args:
        value: Nested dicts and lists with the same structure on every rank.
        keep: Whether this rank keeps the gathered tensors. Otherwise it gets None in their places.
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
    """Shard a tensor, which is the same on every rank, like `target`. Return it unchanged if their shapes differ."""
    fits = isinstance(value, Tensor) and isinstance(target, DTensor) and value.shape == target.shape
    if not fits or isinstance(value, DTensor):
        return value
    whole = value.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)  # no broadcast
