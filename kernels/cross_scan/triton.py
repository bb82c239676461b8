"""Run the cross scan on the GPU: tiles where a channel has one state, Vim's scan where it has several."""

# B batch, K routes, E channels, H x W map, N state

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from ssmpretrain.kernels.cross_scan import many_states, one_state


def forward(
    x: Tensor, parameters: Sequence[Tensor], routes: Sequence[str], keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x_dbl and, if asked, the states that `backward` starts from (otherwise nothing, (0,)).

    Args:
        x: (B, E, H, W), float32, bfloat16 or float16. Kernels read it with channels last; other layouts are copied.
        parameters: x_proj, dt_proj, dt_bias, A and D, float32.
        routes: The route of each of the K sets of weights.
        keep_states: Keep what the backward pass needs.
    """
    return _family(parameters).forward(x, *parameters, routes, keep_states)  # type: ignore[no-any-return]


def backward(
    dy: Tensor, x_dbl: Tensor, states: Tensor, x: Tensor, parameters: Sequence[Tensor], routes: Sequence[str]
) -> list[Tensor]:
    """Return the gradients of x (in its dtype, with its strides where dense) and of every parameter (float32)."""
    return _family(parameters).backward(dy, x_dbl, states, x, *parameters, routes)  # type: ignore[no-any-return]


def x_dbl_shape(x: Tensor, parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the shape of the projections of every position and route."""
    return _family(parameters).x_dbl_shape(x, parameters[1], parameters[3])  # type: ignore[no-any-return]


def states_shape(x: Tensor, parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the shape of what the scan keeps for the backward pass."""
    return _family(parameters).states_shape(x, parameters[3])  # type: ignore[no-any-return]


def _family(parameters: Sequence[Tensor]) -> ModuleType:
    return one_state if parameters[3].shape[2] == 1 else many_states
