"""Every operation refuses an input that is no tensor, before its shape is asked for or its memory is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssmpretrain.kernels.add_norm import add_norm
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.cross_scan import cross_selective_scan
from ssmpretrain.kernels.selective_scan import selective_scan

E, L, N, R = 4, 5, 2, 1


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


DIRECTION = ScanDirection(rand(E, 3), rand(E), rand(R + 2 * N, E), rand(E, R), rand(E), rand(E, N), rand(E))
SCAN = (rand(1, E, L), rand(1, E, L), rand(E, N), rand(1, N, L), rand(1, N, L))
CROSS = (rand(1, E, 2, 3), rand(4, R + 2 * N, E), rand(4, E, R), rand(4, E), rand(4, E, N), rand(4, E))
# Operation, its required tensors, and how they are passed.
OPERATIONS: dict[str, tuple[tuple[torch.Tensor, ...], Callable[..., Any]]] = {
    "selective_scan": (SCAN, selective_scan),
    "cross_selective_scan": (CROSS, lambda *tensors: cross_selective_scan(*tensors, mode="cross")),
    "bidirectional_scan": (
        (rand(1, L, 2 * E), *DIRECTION),
        lambda xz, *rest: bidirectional_scan(xz, ScanDirection(*rest), DIRECTION),
    ),
    "causal_conv1d": ((rand(1, E, L), rand(E, 3)), causal_conv1d),
    "bidirectional_causal_conv1d": ((rand(1, E, L), rand(2, E, 3)), bidirectional_causal_conv1d),
    "add_norm": ((rand(1, L, E), rand(E)), lambda x, weight: add_norm(x, None, weight)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_no_tensor_is_named(operation: str) -> None:
    tensors, call = OPERATIONS[operation]
    call(*tensors)
    for number in range(len(tensors)):
        for wrong in (None, [1.0]):
            with pytest.raises(ValueError, match=rf"{operation}: [\w.]+ is a tensor; got \w+. Pass a torch.Tensor."):
                call(*tensors[:number], wrong, *tensors[number + 1 :])
