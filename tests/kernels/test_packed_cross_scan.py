from typing import Any

import pytest
import torch
from cross_scans import NAMES, leaves_of, make_inputs
from packed_scans import compare_packed, draw_positions
from torch import Tensor

from ssmpretrain.kernels.cross_scan import (
    MODES,
    Mode,
    PackedOrder,
    cross_selective_scan,
    packed_cross_selective_scan,
    packed_orders,
)

SIZES = [(7, 5), (1, 9), (5, 12)]
ROUTES = ("h", "w2", "v_flip", "w3_flip")
SCANS = ["cross", "unidirectional", "bidirectional", ROUTES]


def make_packed(batch: int, channels: int, positions: int, state: int, mode: Mode = "cross") -> list[Tensor]:
    """Inputs whose x is (B, E, L), channels last in memory."""
    routes = len(MODES[mode] if isinstance(mode, str) else mode)
    x, *parameters = make_inputs(batch, channels, 1, positions, state, routes=routes)
    return [x.squeeze(2).mT.contiguous().mT, *parameters]


# ---- the scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", SCANS, ids=str)
def test_values_and_gradients_are_those_of_stepping_over_hidden_positions(
    mode: Mode, size: tuple[int, int], dtype: torch.dtype
) -> None:
    positions = draw_positions(2, *size, size[0] * size[1] // 3)
    inputs = make_packed(2, 6, positions.shape[1], 2, mode)
    compare_packed([t.to(dtype) for t in inputs], positions, size, mode)


@pytest.mark.parametrize("mode", ["cross", ("w7", "h", "w7_flip")], ids=str)
@pytest.mark.parametrize("count", [1, 34, 35])
def test_any_number_of_positions_may_be_visible(count: int, mode: Mode) -> None:
    positions = draw_positions(3, 7, 5, count)
    compare_packed(make_packed(3, 17, count, 1, mode), positions, (7, 5), mode)


@pytest.mark.parametrize("mode", SCANS, ids=str)
def test_with_everything_visible_it_is_the_scan_of_the_map(mode: Mode) -> None:
    x, *parameters = make_packed(2, 24, 35, 2, mode)
    orders = packed_orders(torch.arange(35).expand(2, -1), 7, 5, mode)
    ours = packed_cross_selective_scan(x, *parameters, orders, mode=mode)
    whole = cross_selective_scan(x.unflatten(2, (7, 5)), *parameters, mode=mode)
    torch.testing.assert_close(ours, whole.flatten(2), rtol=1e-6, atol=1e-6)


def test_an_image_does_not_depend_on_what_is_visible_in_another() -> None:
    x, *parameters = make_packed(2, 6, 10, 1)
    first, second, other = draw_positions(3, 6, 6, 10).unsqueeze(1)
    answers = [
        packed_cross_selective_scan(x, *parameters, packed_orders(torch.cat([first, rest]), 6, 6))
        for rest in (second, other)
    ]
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("mode", ["cross", ROUTES], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_meet_half_precision_positions(dtype: torch.dtype, mode: Mode) -> None:
    x, *parameters = make_packed(2, 40, 21, 2, mode)
    compare_packed([x.to(dtype), *parameters], draw_positions(2, 7, 9, 21), (7, 9), mode)


def test_the_orders_are_added_in_float32() -> None:
    x, *parameters = make_packed(1, 4, 20, 1)
    x, orders = x.bfloat16(), packed_orders(torch.arange(20).unsqueeze(0), 4, 5)
    parts = []
    for silent in (slice(0, None, 2), slice(1, None, 2)):  # y is linear in C, the last row of x_proj, and in D
        x_proj, D = parameters[0].clone(), parameters[4].clone()
        x_proj[silent, -1], D[silent] = 0, 0
        parts.append(packed_cross_selective_scan(x, x_proj, *parameters[1:4], D, orders))
    y = packed_cross_selective_scan(x, *parameters, orders)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, parts[0] + parts[1], rtol=1e-6, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    inputs, orders = make_packed(2, 24, 10, 2), packed_orders(draw_positions(2, 5, 6, 10), 5, 6)
    expected = packed_cross_selective_scan(*inputs, orders)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed_cross_selective_scan(*inputs, orders), expected)


def test_any_strides_are_read_and_channels_last_returned() -> None:
    x, *parameters = make_packed(2, 24, 10, 2)
    orders = packed_orders(draw_positions(2, 5, 6, 10), 5, 6)
    expected = packed_cross_selective_scan(x, *parameters, orders)
    for strided in (x.contiguous(), torch.cat([x, x], 1)[:, :24], torch.stack([x, x], -1)[..., 0]):
        ours = packed_cross_selective_scan(strided, *parameters, orders)
        assert torch.equal(ours, expected)
        assert ours.mT.is_contiguous()


def test_rows_in_their_own_order_are_not_copied() -> None:
    x, *parameters = make_packed(2, 24, 10, 2, "bidirectional")
    assert packed_orders(draw_positions(2, 5, 6, 10), 5, 6, "bidirectional") == {}
    leaf, kept = x.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):  # type: ignore[no-untyped-call]
        packed_cross_selective_scan(leaf, *parameters, {}, mode="bidirectional")
    assert x.data_ptr() in kept


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiles_without_graph_breaks(impl: Any) -> None:
    inputs, positions = make_packed(2, 6, 10, 1), draw_positions(2, 5, 6, 10)

    def loss(*tensors: Tensor) -> Tensor:
        orders = packed_orders(positions, 5, 6)
        return packed_cross_selective_scan(*tensors, orders, impl=impl).square().mean()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(inputs)
        answer = run(*leaves)
        results.append([answer, *torch.autograd.grad(answer, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(1, 6, 1, 10), r"x is \(B, E, L\), none but B 0; got \(1, 6, 1, 10\)"),
        ("x", torch.zeros(1, 6, 0), r"none but B 0; got \(1, 6, 0\)"),
        ("x", torch.zeros(1, 6, 10).int(), "x is float32, bfloat16 or float16; got torch.int32"),
        ("x", torch.zeros(1, 6, 9), r"orders are those of x's B L = 9 positions on cpu; got 10 on cpu for 'v'"),
        ("D", torch.zeros(2, 6), r"D is \(K, E\) with K = 4 routes .*; got \(2, 6\)"),
        ("A", torch.zeros(4, 6, 2).half(), "A is float32"),
    ],
)
def test_bad_input_is_named(name: str, value: Tensor, message: str) -> None:
    inputs = make_packed(1, 6, 10, 2)
    inputs[NAMES.index(name)] = value
    with pytest.raises(ValueError, match=f"^packed_cross_selective_scan: .*{message}"):
        packed_cross_selective_scan(*inputs, packed_orders(torch.arange(10).unsqueeze(0), 5, 2))


def test_orders_of_another_mode_are_refused() -> None:
    orders = packed_orders(torch.arange(10).unsqueeze(0), 5, 2, ("w2", "h"))
    assert orders.keys() == {"w2"} and isinstance(orders["w2"], PackedOrder)
    with pytest.raises(ValueError, match=r"need the orders \['v'\]; got \['w2'\]. Give packed_orders the same mode"):
        packed_cross_selective_scan(*make_packed(1, 6, 10, 2), orders)


@pytest.mark.parametrize("positions", [torch.arange(10), torch.zeros(1, 10).int(), torch.zeros(1, 11).long()], ids=str)
def test_positions_that_are_none_are_refused(positions: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^packed_orders: positions are int64 \(B, L\), L from 1 to H W = 10; got"):
        packed_orders(positions, 5, 2)


def test_cascade_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^packed_orders: 'cascade' .* Use cross, unidirectional, bidirectional or a"):
        packed_orders(torch.arange(10).unsqueeze(0), 5, 2, "cascade")
    with pytest.raises(ValueError, match=r"^packed_cross_selective_scan: 'cascade' starts anew"):
        packed_cross_selective_scan(*make_packed(1, 6, 10, 2), {}, mode="cascade")
    with pytest.raises(ValueError, match=r"^packed_orders: a route is .*; got 'diagonal'"):
        packed_orders(torch.arange(10).unsqueeze(0), 5, 2, ("diagonal",))
