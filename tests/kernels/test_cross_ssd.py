"""The scan of Mamba-2 along the routes of a map, and over its visible positions alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_ssds import as_leaves, compare, make_map, walk
from packed_scans import draw_positions
from ssds import Inputs, leaves_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmpretrain.kernels.cross_scan import Mode, PackedOrder, packed_orders
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.ssd import cross_ssd, packed_cross_ssd

ROUTES = ("h", "w2", "v_flip", "w3_flip", "w2_flip", "w2")
MODES = ["cross", "unidirectional", "bidirectional", ROUTES]


@pytest.fixture(params=["native", "chunked", "reference"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype for which "auto" takes an implementation here: float64 for the definition."""
    if request.param == "chunked":
        monkeypatch.setattr(library, "is_available", lambda: False)
    return torch.float64 if request.param == "reference" else torch.float32


def in_float32(inputs: Inputs) -> Inputs:
    return {name: t.float() for name, t in inputs.items()}


def packed(inputs: Inputs, positions: Tensor) -> Inputs:
    """Of the inputs of a map, (B, Y, X, ...), those of some positions, (B, L, ...)."""
    image = torch.arange(len(positions)).unsqueeze(1)
    return {name: t.flatten(1, 2)[image, positions] if t.ndim > 2 else t for name, t in inputs.items()}


def unpacked(inputs: Inputs, positions: Tensor, size: tuple[int, int]) -> tuple[Inputs, Tensor]:
    """The inputs of some positions on a map whose hidden positions hold noise, and which positions are visible."""
    image = torch.arange(len(positions)).unsqueeze(1)

    def on_map(t: Tensor, hidden: Tensor) -> Tensor:
        return hidden.index_put((image, positions), t).unflatten(1, size)

    batch, length = len(positions), size[0] * size[1]
    noise = {n: torch.rand(batch, length, *t.shape[2:], dtype=t.dtype) for n, t in inputs.items() if t.ndim > 2}
    visible = on_map(torch.tensor(True), torch.zeros(batch, length, dtype=torch.bool))
    return {name: on_map(t, noise[name]) if name in noise else t for name, t in inputs.items()}, visible


# ---- a whole map -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "size"), [(mode, (3, 5)) for mode in MODES] + [("cross", (9, 1))], ids=str)
def test_values_and_gradients_are_those_of_walking_the_routes(
    mode: Mode, size: tuple[int, int], dtype: torch.dtype
) -> None:
    given, exact = as_leaves(make_map(size, mode), dtype)
    compare(given, cross_ssd(**given, mode=mode), exact, walk(exact, mode))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_up_in_float32(half: torch.dtype) -> None:
    given, exact = as_leaves(make_map((4, 5), "cross"), half)
    compare(given, cross_ssd(**given), exact, walk(exact, "cross"))


def test_a_map_of_several_chunks_is_right(dtype: torch.dtype) -> None:
    given, exact = as_leaves(make_map((7, 6), ("v", "w4_flip"), batch=1, groups=1), dtype)
    compare(given, cross_ssd(**given, mode=("v", "w4_flip"), chunk=16), exact, walk(exact, ("v", "w4_flip")))


def test_the_skip_is_added_once_or_not_at_all() -> None:
    inputs = in_float32(make_map((3, 5), "cross"))
    skip = inputs["D"].unsqueeze(-1) * inputs["x"]
    without = cross_ssd(**{**inputs, "D": None})
    torch.testing.assert_close(cross_ssd(**inputs), without + skip, rtol=1e-5, atol=1e-5)


class Passes(TorchDispatchMode):
    """Counts the calls of the operator."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.ssmpretrain.ssd.default
        return function(*args, **(kwargs or {}))


def test_two_routes_of_one_order_share_a_pass() -> None:
    for mode, count in (("cross", 2), ("bidirectional", 2), ("unidirectional", 4), (ROUTES, 5)):
        inputs = in_float32(make_map((3, 5), mode))
        with Passes() as passes:
            cross_ssd(**inputs, mode=mode)
        assert passes.count == count, mode


def test_rows_in_their_own_order_are_not_copied() -> None:
    inputs = {name: t.contiguous() for name, t in in_float32(make_map((3, 5), "bidirectional")).items()}
    leaves, kept = leaves_of(inputs), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):  # type: ignore[no-untyped-call]
        cross_ssd(**leaves, mode="bidirectional")
    assert {inputs[name].data_ptr() for name in "xBC"} <= set(kept)


def test_autocast_changes_nothing() -> None:
    inputs = in_float32(make_map((4, 5), "cross"))
    expected = cross_ssd(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_ssd(**inputs), expected)


def compiles(loss: Callable[..., Tensor], inputs: Inputs) -> None:
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = list(leaves_of(inputs).values())
        answer = run(*leaves)
        results.append([answer, *torch.autograd.grad(answer, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("mode", [("w2_flip",), pytest.param(ROUTES, marks=pytest.mark.slow)], ids=str)
def test_compiles_without_graph_breaks(mode: Mode) -> None:
    compiles(lambda *tensors: cross_ssd(*tensors, mode=mode).square().mean(), in_float32(make_map((3, 5), mode)))


@pytest.mark.slow
def test_the_scan_of_positions_compiles_without_graph_breaks() -> None:
    positions = draw_positions(2, 3, 5, 6)

    def loss(*tensors: Tensor) -> Tensor:
        return packed_cross_ssd(*tensors, orders=packed_orders(positions, 3, 5)).square().mean()

    compiles(loss, packed(in_float32(make_map((3, 5), "cross")), positions))


def test_shapes_are_known_on_the_meta_device() -> None:
    inputs = {name: t.to("meta") for name, t in in_float32(make_map((3, 5), ROUTES)).items()}
    y = cross_ssd(**inputs, mode=ROUTES)
    assert y.shape == inputs["x"].shape and y.dtype == torch.float32


# ---- some positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "count"), [("cross", 1), ("cross", 12), (ROUTES, 12)], ids=str)
def test_hidden_positions_are_stepped_over(mode: Mode, count: int, dtype: torch.dtype) -> None:
    positions = draw_positions(2, 5, 7, count)
    given, exact = as_leaves(packed(make_map((5, 7), mode), positions), dtype)
    y = packed_cross_ssd(**given, orders=packed_orders(positions, 5, 7, mode), mode=mode)
    on_map, visible = unpacked(exact, positions, (5, 7))
    compare(given, y, exact, packed({"y": walk(on_map, mode, visible)}, positions)["y"])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_with_everything_visible_it_is_the_scan_of_the_map(mode: Mode, dtype: torch.dtype) -> None:
    inputs, _ = as_leaves(make_map((5, 7), mode), dtype)
    positions = torch.arange(35).expand(2, -1)
    ours = packed_cross_ssd(**packed(inputs, positions), orders=packed_orders(positions, 5, 7, mode), mode=mode)
    whole = cross_ssd(**inputs, mode=mode)
    assert torch.equal(ours, whole.flatten(1, 2))
    for one, other in zip(*(torch.autograd.grad(y.sum(), list(inputs.values())) for y in (ours, whole)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_an_image_does_not_depend_on_what_is_visible_in_another() -> None:
    positions, other = draw_positions(4, 6, 6, 10).split(2)
    inputs = packed(in_float32(make_map((6, 6), ROUTES)), positions)
    answers = [
        packed_cross_ssd(
            **inputs, orders=packed_orders(torch.cat([positions[:1], rest[1:]]), 6, 6, ROUTES), mode=ROUTES
        )
        for rest in (positions, other)
    ]
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][1], answers[1][1])


def test_each_position_reads_only_what_its_routes_have_visited() -> None:
    """With one route, a change at a visible position changes that position and those behind it, and no other."""
    positions = draw_positions(1, 5, 7, 12)
    for route in ("h", "v_flip", "w3"):
        inputs = packed(in_float32(make_map((5, 7), (route,), batch=1)), positions)
        orders = packed_orders(positions, 5, 7, (route,))
        before = packed_cross_ssd(**inputs, orders=orders, mode=(route,))
        inputs["x"] = inputs["x"].clone()
        inputs["x"][0, 4] += 1
        changed = (packed_cross_ssd(**inputs, orders=orders, mode=(route,)) != before).flatten(2).any(2)[0]
        base = route.removesuffix("_flip")
        rank = torch.arange(12) if base == "h" else orders[base].steps
        behind = rank <= rank[4] if route.endswith("_flip") else rank >= rank[4]
        assert torch.equal(changed, behind), route


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 15, 4, 5), r"x is \(B, Y, X, H, P\), none but B 0; got \(2, 15, 4, 5\)"),
        (
            "dt",
            torch.zeros(2, 3, 5, 2, 4),
            r"dt is \(B, Y, X, K, H\) = \(2, 3, 5, 4, 4\) like x for the K = 4 routes h, v",
        ),
        ("A", torch.zeros(4), r"A is \(K, H\) with x's H = 4 for the K = 4 routes h, v, h_flip, v_flip; got \(4,\)"),
        (
            "B",
            torch.zeros(2, 5, 3, 2, 3),
            r"B is \(B, Y, X, G, N\) with B, Y, X = 2, 3, 5 like x; got \(2, 5, 3, 2, 3\)",
        ),
        ("D", torch.zeros(4, 4), r"D is \(H,\) with x's H = 4; got \(4, 4\)"),
        ("A", torch.zeros(4, 4).half(), "A is float32"),
        ("chunk", 8, "chunk is a multiple of 16"),
        (
            "mode",
            "cascade",
            "'cascade' starts anew in every row and column, .* Use cross, unidirectional, bidirectional or",
        ),
        ("mode", "zigzag", "mode is one of cross, .*; got 'zigzag'"),
        ("mode", ("h", "diagonal"), "a route is h, v, or w .*; got 'diagonal'"),
        ("impl", "cuda", "impl is one of auto"),
    ],
)
def test_bad_input_of_a_map_is_named(name: str, value: Any, message: str) -> None:
    inputs: dict[str, Any] = {**in_float32(make_map((3, 5), "cross")), name: value}
    with pytest.raises(ValueError, match=f"^cross_ssd: .*{message}"):
        cross_ssd(**inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 5, 4, 5), r"x is \(B, L, H, P\), none but B 0; got \(2, 3, 5, 4, 5\)"),
        ("dt", torch.zeros(2, 15, 4), r"dt is \(B, L, K, H\) = \(2, 15, 4, 4\) like x for .*; got \(2, 15, 4\)"),
        ("orders", {}, r"need the orders \['v'\]; got \[\]. Give packed_orders the same mode"),
        (
            "orders",
            packed_orders(torch.zeros(2, 9).long(), 3, 5),
            r"orders are those of x's B L = 30 positions on cpu; got 18 on cpu for 'v'",
        ),
        ("mode", "cascade", "'cascade' starts anew"),
    ],
)
def test_bad_input_of_positions_is_named(name: str, value: Any, message: str) -> None:
    positions = torch.arange(15).expand(2, -1)
    inputs: dict[str, Any] = packed(in_float32(make_map((3, 5), "cross")), positions)
    inputs |= {"orders": packed_orders(positions, 3, 5), name: value}
    assert isinstance(packed_orders(positions, 3, 5)["v"], PackedOrder)
    with pytest.raises(ValueError, match=f"^packed_cross_ssd: .*{message}"):
        packed_cross_ssd(**inputs)
