"""Inputs that are no tensors: an error at the boundary, where a kernel would read memory that is not there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssmpretrain.kernels.add_norm import add_norm
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.cross_scan import (
    cross_merge,
    cross_scan,
    cross_selective_scan,
    packed_cross_selective_scan,
    packed_orders,
)
from ssmpretrain.kernels.selective_scan import selective_scan
from ssmpretrain.kernels.ssd import bidirectional_ssd, cross_ssd, packed_cross_ssd, ssd


def scan_both_ways(xz: Tensor, *parameters: Tensor) -> Tensor:
    return bidirectional_scan(xz, ScanDirection(*parameters))


def scan_packed(*tensors: Tensor) -> Tensor:
    return packed_cross_selective_scan(*tensors, orders={}, mode=("h",))


def scan_routes(*tensors: Tensor) -> Tensor:
    return cross_selective_scan(*tensors, mode=("h",))


def ssd_of_routes(*tensors: Tensor) -> Tensor:
    return cross_ssd(*tensors, mode=("h",))


def ssd_of_positions(*tensors: Tensor) -> Tensor:
    return packed_cross_ssd(*tensors, None, {}, mode=("h",))


DIRECTION = [(4, 3), (4,), (5, 4), (4, 1), (4,), (4, 2), (4,)]
ROUTE = [(1, 5, 4), (1, 4, 1), (1, 4), (1, 4, 2), (1, 4)]
NEEDED: dict[Callable[..., object], list[tuple[int, ...]]] = {  # shapes of all inputs that must be there
    selective_scan: [(1, 4, 5), (1, 4, 5), (4, 2), (1, 2, 5), (1, 2, 5)],
    scan_both_ways: [(1, 5, 8), *DIRECTION],
    scan_routes: [(1, 4, 3, 3), *ROUTE],
    scan_packed: [(1, 4, 5), *ROUTE],
    cross_scan: [(1, 4, 3, 3)],
    cross_merge: [(1, 4, 4, 3, 3)],
    ssd: [(1, 5, 2, 3), (1, 5, 2), (2,), (1, 5, 1, 4), (1, 5, 1, 4)],
    bidirectional_ssd: [(1, 5, 2, 3), (1, 5, 2), (2,), (1, 5, 1, 4), (1, 5, 1, 4)],
    ssd_of_routes: [(1, 3, 3, 2, 3), (1, 3, 3, 1, 2), (1, 2), (1, 3, 3, 1, 4), (1, 3, 3, 1, 4)],
    ssd_of_positions: [(1, 5, 2, 3), (1, 5, 1, 2), (1, 2), (1, 5, 1, 4), (1, 5, 1, 4)],
    causal_conv1d: [(1, 4, 5), (4, 3)],
    bidirectional_causal_conv1d: [(1, 4, 5), (2, 4, 3)],
}


@pytest.mark.parametrize("operation", NEEDED, ids=lambda one: one.__name__)
def test_what_is_no_tensor_is_named(operation: Callable[..., object]) -> None:
    tensors = [torch.rand(shape) for shape in NEEDED[operation]]
    operation(*tensors)  # fits
    for wrong, words in ((None, "None"), (3.0, "float"), ([[1.0]], "list")):
        for at in range(len(tensors)):
            with pytest.raises(ValueError, match=rf"^\w+: [\w.]+ is a tensor; got {words}\. Give a tensor\.$"):
                operation(*tensors[:at], wrong, *tensors[at + 1 :])


def test_optional_inputs_of_another_kind_and_others_are_named_too() -> None:
    x, weight = torch.rand(1, 4, 5), torch.rand(5)
    add_norm(x, None, weight)
    for arguments, name in (((None, x, weight), "x"), ((x, None, None), "weight")):
        with pytest.raises(ValueError, match=rf"^add_norm: {name} is a tensor; got None\."):
            add_norm(*arguments)
    with pytest.raises(ValueError, match=r"^add_norm: drop_path_scale is a tensor or None; got float\."):
        add_norm(x, None, weight, drop_path_scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^packed_orders: positions is a tensor; got None\."):
        packed_orders(None, 3, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^bidirectional_scan: forward is a ScanDirection; got NoneType\."):
        bidirectional_scan(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^cross_scan: mode is a name or a sequence of routes; got None\."):
        cross_scan(torch.rand(1, 4, 3, 3), mode=None)  # type: ignore[arg-type]
