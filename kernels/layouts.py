"""Layouts of tensors that kernels read."""

from torch import Tensor


def with_dense_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last stride is 1: the tensor itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
