"""Launch the native cross scan: allocate, and hand over sizes, strides, the routes' tables and addresses."""

from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.routes import split_flip, visiting_order
from ssmpretrain.kernels.native import library

_ABSENT_TENSOR = (0, 0, 0, 0, 0)


def forward(x: Tensor, parameters: Sequence[Tensor], routes: Sequence[str], keep_states: bool) -> list[Tensor]:
    """Return y in float32, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,)).

    Args:
        x: (B, E, H, W), float32 or bfloat16, any strides.
        parameters: x_proj, dt_proj, dt_bias, A and D, float32.
        routes: The route of each of the K sets of weights.
        keep_states: Keep what the backward pass needs.
    """
    x_dbl = x.new_empty(x_dbl_shape(x, parameters), dtype=torch.float32)
    states = x.new_empty(states_shape(x, parameters) if keep_states else (0,), dtype=torch.float32)
    y = torch.empty_like(x, dtype=torch.float32)
    y_flat, x_flat = y.flatten(2), x.flatten(2)
    parameters = [p.contiguous() for p in parameters]
    orders = _orders(routes, x)  # alive until the call is over
    routes_array = _routes(routes, orders)
    arguments = (
        *_sizes(x, parameters, routes_array),
        *_fields(x_flat),
        *_fields(y_flat),
        *(x_dbl.data_ptr(), states.data_ptr() if keep_states else 0),
        *(p.data_ptr() for p in parameters),
    )
    _library().call("cross_selective_scan", arguments)
    return [_unflattened(y, y_flat), x_dbl, states]


def backward(
    dy: Tensor, x_dbl: Tensor, states: Tensor, x: Tensor, parameters: Sequence[Tensor], routes: Sequence[str]
) -> list[Tensor]:
    """Return the gradients of x (in its dtype, with its strides where dense) and of every parameter (float32)."""
    dx = torch.empty_like(x)
    dx_flat, dy_flat, x_flat = dx.flatten(2), dy.flatten(2), x.flatten(2)
    parameters = [p.contiguous() for p in parameters]
    gradients = [torch.empty_like(p) for p in parameters]
    orders = _orders(routes, x)  # alive until the call is over
    routes_array = _routes(routes, orders)
    arguments = (
        *_sizes(x, parameters, routes_array),
        *_fields(x_flat),
        *_ABSENT_TENSOR,
        *(x_dbl.data_ptr(), states.data_ptr()),
        *(p.data_ptr() for p in parameters),
        *_fields(dy_flat),
        *_fields(dx_flat),
        *(g.data_ptr() for g in gradients),
    )
    _library().call("cross_selective_scan_backward", arguments)
    return [_unflattened(dx, dx_flat), *gradients]


def x_dbl_shape(x: Tensor, parameters: Sequence[Tensor]) -> tuple[int, int, int]:
    """Return the shape of dt, B and C of all routes side by side, (B, L, columns).

    The columns are padded so that the last route's, rounded up to whole vectors of 16, are inside.
    """
    num_routes, columns, _ = parameters[0].shape
    padded = _round_up((num_routes - 1) * columns + _round_up(columns, 16), 16)
    return x.shape[0], x.shape[2] * x.shape[3], padded


def states_shape(x: Tensor, parameters: Sequence[Tensor]) -> tuple[int]:
    """Return how many floats hold the states between chunks, channels padded to 16, as a shape."""
    batch, channels, height, width = x.shape
    num_routes, _, state = parameters[3].shape
    chunks = -(-height * width // library.CHUNK)
    return (num_routes * batch * chunks * state * _round_up(channels, 16),)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _library() -> library.NativeLibrary:
    native = library.load()
    assert native is not None, "the choice in api.py comes first"
    return native


def _sizes(x: Tensor, parameters: Sequence[Tensor], routes_array: "array[int]") -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    num_routes, _, rank = parameters[1].shape
    state = parameters[3].shape[2]
    return (
        *(library.threads(), batch, channels, height * width, state, rank, num_routes, library.CHUNK),
        *(x.dtype == torch.bfloat16, routes_array.buffer_info()[0]),
    )


def _orders(routes: Sequence[str], x: Tensor) -> list[Tensor]:
    return [_order(split_flip(route)[0], x.shape[2], x.shape[3]) for route in routes]


@lru_cache(maxsize=64)  # the orders of 16 map sizes; an entry is as large as one float32 channel of the map
def _order(base: str, height: int, width: int) -> Tensor:
    return visiting_order(base, height, width, torch.device("cpu")).int()


def _routes(routes: Sequence[str], orders: Sequence[Tensor]) -> "array[int]":
    """Return, for each route, the address of its order and whether it is walked backwards."""
    pairs = ((order.data_ptr(), split_flip(route)[1]) for route, order in zip(routes, orders, strict=True))
    return array("q", [value for pair in pairs for value in pair])


def _fields(flat: Tensor) -> tuple[int, ...]:
    """Describe a (B, E, L) tensor of float32 or bfloat16."""
    return (flat.data_ptr(), flat.dtype == torch.bfloat16, *flat.stride())


def _unflattened(tensor: Tensor, flat: Tensor) -> Tensor:
    """Return a tensor that was written through its flattened form, which is a copy where H and W do not flatten."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
    return tensor
