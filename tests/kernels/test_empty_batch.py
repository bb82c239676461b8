"""An empty batch, as a detector has it without proposals: an empty result, and gradients of zero for all parameters."""

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
from ssmpretrain.kernels.gated_norm import gated_rms_norm
from ssmpretrain.kernels.selective_scan import selective_scan
from ssmpretrain.kernels.ssd import bidirectional_ssd, cross_ssd, ssd

E, N, R, L = 6, 2, 3, 4
MIXER = ((E, 4), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,))
ROUTES = ((4, R + 2 * N, E), (4, E, R), (4, E), (4, E, N), (4, E))

Operation = Callable[[list[Tensor]], object]
OPERATIONS: dict[str, tuple[Operation, tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "selective_scan": (
        lambda t: selective_scan(*t[:6], z=t[6], delta_bias=t[7], return_last_state=True),
        ((0, E, L), (0, E, L), (E, N), (0, N, L), (0, N, L), (E,), (0, E, L), (E,)),
        (0, E, L),
    ),
    "bidirectional_scan": (
        lambda t: bidirectional_scan(t[0], ScanDirection(*t[1:8]), ScanDirection(*t[8:])),
        ((0, L, 2 * E), *MIXER, *MIXER),
        (0, L, E),
    ),
    "cross_selective_scan": (lambda t: cross_selective_scan(*t), ((0, E, 2, 2), *ROUTES), (0, E, 2, 2)),
    "cascade": (lambda t: cross_selective_scan(*t, mode="cascade"), ((0, E, 2, 2), *ROUTES), (0, E, 2, 2)),
    "packed_cross_selective_scan": (
        lambda t: packed_cross_selective_scan(*t, packed_orders(t[0].new_zeros(0, L, dtype=torch.int64), 2, 4)),
        ((0, E, L), *ROUTES),
        (0, E, L),
    ),
    "cross_scan": (lambda t: cross_scan(*t), ((0, E, 2, 2),), (0, 4, E, 4)),
    "cross_merge": (lambda t: cross_merge(*t), ((0, 4, E, 2, 2),), (0, E, 2, 2)),
    "causal_conv1d": (lambda t: causal_conv1d(*t, activation="silu"), ((0, E, L), (E, 4), (E,)), (0, E, L)),
    "bidirectional_causal_conv1d": (
        lambda t: bidirectional_causal_conv1d(*t),
        ((0, E, L), (2, E, 4), (2, E)),
        (2, 0, E, L),
    ),
    "ssd": (
        lambda t: ssd(*t),
        ((0, L, 2, 3), (0, L, 2), (2,), (0, L, 1, N), (0, L, 1, N), (2,), (0, L, 2, 3)),
        (0, L, 2, 3),
    ),
    "bidirectional_ssd": (
        lambda t: bidirectional_ssd(*t[:6], dt_backward=t[6], A_backward=t[7]),
        ((0, L, 2, 3), (0, L, 2), (2,), (0, L, 1, N), (0, L, 1, N), (2,), (0, L, 2), (2,)),
        (0, L, 2, 3),
    ),
    "cross_ssd": (
        lambda t: cross_ssd(*t),
        ((0, 2, 2, 2, 3), (0, 2, 2, 4, 2), (4, 2), (0, 2, 2, 1, N), (0, 2, 2, 1, N), (2,)),
        (0, 2, 2, 2, 3),
    ),
    "gated_rms_norm": (lambda t: gated_rms_norm(*t), ((0, L, E), (0, L, E), (E,)), (0, L, E)),
    "add_norm": (lambda t: add_norm(*t), ((0, L, E), (0, L, E), (E,), (E,)), (0, L, E)),
}


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(name: str, device: str) -> None:
    run, shapes, expected = OPERATIONS[name]
    leaves = [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]
    outputs = run(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert outputs[0].shape == expected
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
