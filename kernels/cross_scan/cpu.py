"""Launch the native cross scan: allocate outputs and pass sizes, strides, tables of the routes and addresses."""

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.routes import split_flip, visiting_order
from ssmpretrain.kernels.native import library

_ABSENT_TENSOR = (0, 0, 0, 0, 0)


def forward(inputs: CrossScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in float32, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    x = inputs.x
    x_dbl = x.new_empty(x_dbl_shape(inputs), dtype=torch.float32)
    states = x.new_empty(states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    y = torch.empty_like(x, dtype=torch.float32)
    y_flat, x_flat = y.flatten(2), x.flatten(2)
    parameters = [p.contiguous() for p in inputs.parameters]
    orders = _orders(inputs)  # alive until the call is over
    routes = _routes(inputs, orders)
    arguments = (
        *_sizes(inputs, routes),
        *_fields(x_flat),
        *_fields(y_flat),
        *(x_dbl.data_ptr(), states.data_ptr() if keep_states else 0),
        *(p.data_ptr() for p in parameters),
    )
    library.call("cross_selective_scan", arguments)
    return _unflattened(y, y_flat), x_dbl, states


def backward(dy: Tensor, x_dbl: Tensor, states: Tensor, inputs: CrossScanInputs) -> list[Tensor]:
    """Return the gradients of x (in its dtype, with its strides where dense) and of every parameter (float32)."""
    x = inputs.x
    dx = torch.empty_like(x)
    dx_flat, dy_flat, x_flat = dx.flatten(2), dy.flatten(2), x.flatten(2)
    parameters = [p.contiguous() for p in inputs.parameters]
    gradients = [torch.empty_like(p) for p in parameters]
    orders = _orders(inputs)  # alive until the call is over
    routes = _routes(inputs, orders)
    arguments = (
        *_sizes(inputs, routes),
        *_fields(x_flat),
        *_ABSENT_TENSOR,
        *(x_dbl.data_ptr(), states.data_ptr()),
        *(p.data_ptr() for p in parameters),
        *_fields(dy_flat),
        *_fields(dx_flat),
        *(g.data_ptr() for g in gradients),
    )
    library.call("cross_selective_scan_backward", arguments)
    return [_unflattened(dx, dx_flat), *gradients]


def x_dbl_shape(inputs: CrossScanInputs) -> tuple[int, int, int]:
    """Return the shape of dt, B and C of all routes side by side, (B, L, columns).

    The columns are padded so that the last route's, rounded up to whole vectors of 16, are inside.
    """
    batch, _, height, width = inputs.x.shape
    num_routes, columns, _ = inputs.x_proj.shape
    padded = _round_up((num_routes - 1) * columns + _round_up(columns, 16), 16)
    return batch, height * width, padded


def states_shape(inputs: CrossScanInputs) -> tuple[int]:
    """Return the number of floats, as a shape, of all states between chunks; channels padded to 16."""
    batch, channels, height, width = inputs.x.shape
    num_routes, _, state = inputs.A.shape
    chunks = -(-height * width // library.CHUNK)
    return (num_routes * batch * chunks * state * _round_up(channels, 16),)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _sizes(inputs: CrossScanInputs, routes: "array[int]") -> tuple[int, ...]:
    batch, channels, height, width = inputs.x.shape
    num_routes, _, rank = inputs.dt_proj.shape
    state = inputs.A.shape[2]
    return (
        *(batch, channels, height * width, state, rank, num_routes, library.CHUNK),
        *(inputs.x.dtype == torch.bfloat16, routes.buffer_info()[0]),
    )


def _orders(inputs: CrossScanInputs) -> list[Tensor]:
    height, width = inputs.x.shape[2:]
    return [_order(split_flip(route)[0], height, width) for route in inputs.routes]


@lru_cache(maxsize=64)  # the orders of 16 map sizes; an entry is as large as one float32 channel of the map
def _order(base: str, height: int, width: int) -> Tensor:
    return visiting_order(base, height, width, torch.device("cpu")).int()


def _routes(inputs: CrossScanInputs, orders: list[Tensor]) -> "array[int]":
    """Return, for each route, the address of its order and whether it is walked backwards."""
    pairs = ((order.data_ptr(), split_flip(route)[1]) for route, order in zip(inputs.routes, orders, strict=True))
    return array("q", [value for pair in pairs for value in pair])


def _fields(flat: Tensor) -> tuple[int, ...]:
    """Describe a (B, E, L) tensor of float32 or bfloat16."""
    return (flat.data_ptr(), flat.dtype == torch.bfloat16, *flat.stride())


def _unflattened(tensor: Tensor, flat: Tensor) -> Tensor:
    """Return a tensor that was written through its flattened form, a copy if H and W have no common stride."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
    return tensor
