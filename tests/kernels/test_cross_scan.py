from typing import Any

import pytest
import torch
from cross_scans import NAMES, TOLERANCES, WINDOWS, compare, error, leaves_of, make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.cross_scan import (
    MODES,
    Mode,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_selective_scan_reference,
)
from ssmpretrain.kernels.cross_scan.op import cross_selective_scan_backward_op, cross_selective_scan_op
from ssmpretrain.kernels.cross_scan.routes import visiting_order
from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks

SIZES = [(7, 5), (1, 9), (9, 1), (15, 16)]


# ---- routes ----------------------------------------------------------------------------------------------------------


def visited(route: str, height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns in the order of a route, from nested loops."""
    base = route.removesuffix("_flip")
    if base == "h":
        order = [(row, col) for row in range(height) for col in range(width)]
    elif base == "v":
        order = [(row, col) for col in range(width) for row in range(height)]
    else:
        size = int(base[1:])
        order = []
        for top in range(0, height, size):
            for left in range(0, width, size):
                rows, cols = range(top, min(top + size, height)), range(left, min(left + size, width))
                order += [(row, col) for row in rows for col in cols]
    return order[::-1] if route.endswith("_flip") else order


@pytest.mark.parametrize("route", [r + f for r in ("h", "v", "w1", "w2", "w7", "w60") for f in ("", "_flip")])
def test_order_of_a_route_is_that_of_nested_loops(route: str) -> None:
    for height, width in [*SIZES, (56, 57)]:
        expected = [row * width + col for row, col in visited(route, height, width)]
        assert visiting_order(route, height, width).tolist() == expected, (height, width)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["cross", "unidirectional", "bidirectional", WINDOWS], ids=str)
def test_cross_scan_reads_every_position_in_the_order_of_its_route(mode: Mode, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    routes = MODES[mode] if isinstance(mode, str) else mode
    sequences = cross_scan(x, mode)
    assert sequences.shape == (2, len(routes), 3, size[0] * size[1]) and sequences.is_contiguous()
    for k, route in enumerate(routes):
        expected = torch.stack([x[:, :, row, col] for row, col in visited(route, *size)], dim=-1)
        assert torch.equal(sequences[:, k], expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["cross", "unidirectional", "bidirectional", WINDOWS], ids=str)
def test_cross_merge_is_the_adjoint_of_cross_scan(mode: Mode, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    sequences = cross_scan(x, mode)
    y = torch.randn_like(sequences, requires_grad=True)
    merged = cross_merge(y, size, mode)
    torch.testing.assert_close((sequences * y).sum(), (x * merged).sum())
    assert torch.equal(merged, cross_merge(y.unflatten(-1, size), mode=mode))

    # each one's gradient is the other
    torch.testing.assert_close(torch.autograd.grad(sequences, x, y.detach())[0], merged)
    assert torch.equal(torch.autograd.grad(merged, y, x.detach())[0], sequences)


def test_merging_what_was_scanned_gives_the_map_once_per_route() -> None:
    x = torch.randn(2, 3, 7, 5).bfloat16()
    merged = cross_merge(cross_scan(x, WINDOWS), (7, 5), WINDOWS)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (5 * x.float()).bfloat16())


def test_cross_merge_adds_in_float32() -> None:
    y = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().reshape(1, 4, 1, 1)  # bfloat16 cannot hold 257
    assert cross_merge(y, (1, 1)).item() == 260


# ---- the scan --------------------------------------------------------------------------------------------------------


def loop(inputs: list[Tensor], routes: tuple[str, ...]) -> Tensor:
    """The scan from its definition, one position and one route at a time."""
    x, x_proj, dt_proj, dt_bias, A, D = inputs
    rank, state = dt_proj.shape[2], A.shape[2]
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for k, route in enumerate(routes):
            h = torch.zeros_like(A[k])
            for row, col in visited(route, *x.shape[2:]):
                u = x[b, :, row, col]
                x_dbl = x_proj[k] @ u
                delta = torch.log1p(torch.exp(dt_proj[k] @ x_dbl[:rank] + dt_bias[k]))
                drive = torch.outer(delta * u, x_dbl[rank : rank + state])
                h = torch.exp(delta[:, None] * A[k]) * h + drive
                y[b, :, row, col] += h @ x_dbl[rank + state :] + D[k] * u
    return y


@pytest.mark.parametrize("mode", ["cross", "unidirectional", "bidirectional", WINDOWS], ids=str)
def test_reference_agrees_with_a_loop_over_positions(mode: Mode) -> None:
    routes = MODES[mode] if isinstance(mode, str) else mode
    inputs = [t.double() for t in make_inputs(2, 3, 5, 4, 2, 2, len(routes))]
    torch.testing.assert_close(cross_selective_scan(*inputs, mode=mode), loop(inputs, routes))


def test_cascade_scans_every_row_and_then_every_column_from_zero() -> None:
    x, *parameters = (t.double() for t in make_inputs(2, 3, 5, 4, 2, 2))
    rows, columns = [p[:2] for p in parameters], [p[2:] for p in parameters]
    y = torch.cat([loop([x[:, :, row : row + 1], *rows], ("h", "h_flip")) for row in range(5)], dim=2)
    mean, variance = y.mean(1, keepdim=True), y.var(1, correction=0, keepdim=True)
    y = (y - mean) / (variance + 1e-5).sqrt()
    y = torch.cat([loop([y[:, :, :, col : col + 1], *columns], ("v", "v_flip")) for col in range(4)], dim=3)
    torch.testing.assert_close(cross_selective_scan(x, *parameters, mode="cascade"), y)


SHAPES = [  # batch, channels, height, width, state, rank
    (2, 5, 7, 5, 3, 2),
    (1, 17, 1, 9, 1, 3),
    (2, 40, 9, 1, 16, 1),
    (1, 17, 15, 16, 2, 6),
    (13, 33, 3, 3, 20, 27),
    (1, 3, 56, 57, 1, 48),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_forward_and_backward(shape: tuple[int, ...]) -> None:
    compare(make_inputs(*shape), impl="cpu")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
@pytest.mark.parametrize("mode", ["unidirectional", "bidirectional", "cascade"])
def test_agrees_with_the_reference_in_every_mode(mode: str, shape: tuple[int, ...]) -> None:
    compare(make_inputs(*shape), mode)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("routes", [WINDOWS, ("w7_flip",)], ids=str)
def test_agrees_with_the_reference_on_windows(routes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    compare(make_inputs(*shape, routes=len(routes)), routes)


@pytest.mark.parametrize("mode", ["cross", "cascade"])
def test_chunked_scan_inside_agrees_with_the_reference(mode: str) -> None:
    def chunked(*inputs: Tensor, mode: str) -> Tensor:
        return cross_selective_scan_reference(*inputs, mode=mode, scan=scan_in_chunks)

    compare(make_inputs(*SHAPES[0]), mode, chunked)


@pytest.mark.parametrize("mode", ["cross", "cascade", WINDOWS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_meet_half_precision_maps(dtype: torch.dtype, mode: Mode) -> None:
    x, *parameters = make_inputs(2, 40, 7, 9, 2, 6, 5 if mode == WINDOWS else 4)
    compare([x.to(dtype), *parameters], mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_projections_are_used_in_the_dtype_of_the_map_and_the_rest_in_float32(impl: Any, dtype: torch.dtype) -> None:
    x, *parameters = make_inputs(1, 24, 5, 7, 4)
    x = x.to(dtype)
    ours = cross_selective_scan(x, *parameters, impl=impl)
    for i, name in enumerate(NAMES[1:]):
        changed = list(parameters)
        changed[i] = changed[i].to(dtype).float()
        same = torch.equal(ours, cross_selective_scan(x, *changed, impl=impl))
        assert same == (name in ("x_proj", "dt_proj")), name


def test_neither_what_the_projections_give_nor_the_sum_of_the_routes_is_rounded() -> None:
    x, *parameters = make_inputs(1, 40, 7, 9, 2, 6)
    x = x.bfloat16()
    rounded = [p.bfloat16() if i < 2 else p for i, p in enumerate(parameters)]
    truth = cross_selective_scan(x.double(), *(p.double() for p in rounded))
    for impl in ("cpu", "reference"):
        ours = cross_selective_scan(x, *parameters, impl=impl)  # type: ignore[arg-type]
        assert error(ours, truth) < TOLERANCES[torch.float32], impl


@pytest.mark.parametrize("mode", ["cross", "cascade", WINDOWS], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_sum_beyond_float16_is_finite_and_right(impl: Any, mode: Mode) -> None:
    x, *parameters = make_inputs(1, 24, 5, 7, 1, routes=5 if mode == WINDOWS else 4)
    x, parameters[-1] = x.half(), 1e5 * parameters[-1]
    truth = cross_selective_scan(x.double(), *(p.double() for p in parameters), mode=mode)
    if mode != "cascade":  # there the rows' sums, inside, are as large
        assert truth.abs().max() > 2 * torch.finfo(torch.float16).max
    leaf = x.requires_grad_()
    y = cross_selective_scan(leaf, *parameters, mode=mode, impl=impl)
    assert error(y, truth) < TOLERANCES[torch.float16]
    y.mean().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


def test_half_precision_parameters_get_gradients_in_their_dtype() -> None:
    named = zip(NAMES, make_inputs(2, 24, 5, 6, 2), strict=True)
    compare([t if name == "A" else t.bfloat16() for name, t in named])


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(2, 24, 5, 6, 2)
    for impl in ("cpu", "reference"):
        for mode in ("cross", "cascade"):
            expected = cross_selective_scan(*inputs, mode=mode, impl=impl)  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16):
                ours = cross_selective_scan(*inputs, mode=mode, impl=impl)  # type: ignore[arg-type]
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", ["cross", "cascade"])
def test_any_strides_are_read_and_those_of_a_dense_map_returned(mode: str) -> None:
    x, *parameters = make_inputs(2, 24, 7, 6, 2)
    expected = cross_selective_scan(x, *parameters, mode=mode)
    for strided in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,  # columns lie together: height and width do not flatten
        x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        torch.stack([x, x], -1)[..., 0],
        torch.cat([x, x], 3)[..., :6],
    ):
        assert not strided.is_contiguous()
        assert torch.equal(cross_selective_scan(strided, *parameters, mode=mode), expected)
        compare([strided, *parameters], mode)
        reference = cross_selective_scan(strided, *parameters, mode=mode, impl="reference")
        assert reference.stride() == torch.empty_like(strided).stride()
    compare([x[:, :1].expand(-1, 24, -1, -1), *parameters], mode)


def test_gradient_of_any_strides_is_read() -> None:
    leaves = leaves_of(make_inputs(2, 24, 7, 6, 2))
    out = cross_selective_scan(*leaves)
    for strided in (torch.ones(()).expand_as(out), torch.randn(2, 24, 6, 7).mT):
        ours, expected = (
            torch.autograd.grad(out, leaves, dy, retain_graph=True) for dy in (strided, strided.contiguous())
        )
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(one, other)


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    inputs = make_inputs(2, 40, 9, 15, 2, 5)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        leaves = leaves_of(inputs)
        out = cross_selective_scan(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_working_memory_left_by_another_call_does_not_matter() -> None:
    inputs = make_inputs(1, 24, 7, 6, 3)
    clean = cross_selective_scan(*inputs)
    x, *parameters = make_inputs(2, 48, 9, 11, 3)
    poison = torch.full_like(x, torch.nan).requires_grad_()
    cross_selective_scan(poison, *parameters).sum().backward()
    assert poison.grad is not None and poison.grad.isnan().any()
    assert torch.equal(cross_selective_scan(*inputs), clean)
    compare(inputs)


def test_training_works_after_inference_mode() -> None:
    inputs = make_inputs(1, 5, 6, 11, 1)  # a map size that no other test has cached
    with torch.inference_mode():
        expected = cross_selective_scan(*inputs)
    assert torch.equal(cross_selective_scan(*inputs), expected)
    compare(inputs)


def test_huge_steps_forget_everything_without_nan() -> None:
    inputs = make_inputs(1, 24, 5, 8, 2)
    inputs[NAMES.index("dt_bias")].fill_(1e4)
    leaves = leaves_of(inputs)
    out = cross_selective_scan(*leaves)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("mode", ["cross", "cascade", ("w2", "w2_flip")], ids=str)
def test_reference_passes_gradcheck(mode: Mode) -> None:
    leaves = leaves_of(make_inputs(1, 3, 3, 2, 2, 2, 4 if isinstance(mode, str) else 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: cross_selective_scan_reference(*tensors, mode=mode), leaves, fast_mode=True
    )


# ---- what PyTorch knows ----------------------------------------------------------------------------------------------


def test_operators_pass_opcheck() -> None:
    # 16 channels: the kept states then have no padding, whose content is free, and can be compared
    leaves, routes = leaves_of(make_inputs(2, 16, 5, 7, 2)), "h w2_flip v v_flip"
    torch.library.opcheck(cross_selective_scan_op, (*leaves, routes, True, "native"))
    inputs = [t.detach() for t in leaves]
    torch.library.opcheck(cross_selective_scan_op, (*inputs, routes, False, "native"))
    out, x_dbl, states = cross_selective_scan_op(*inputs, routes, True, "native")
    torch.library.opcheck(cross_selective_scan_backward_op, (out, x_dbl, states, *inputs, routes, "native"))
    channels_last = inputs[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(cross_selective_scan_op, (channels_last, *inputs[1:], routes, False, "native"))


@pytest.mark.parametrize(("mode", "impl"), [("cross", "cpu"), ("cascade", "cpu"), (WINDOWS[:4], "reference")], ids=str)
def test_compiles_without_graph_breaks(mode: Mode, impl: Any) -> None:
    inputs = make_inputs(2, 6, 3, 5, 1)

    def loss(*tensors: Tensor) -> Tensor:
        return cross_selective_scan(*tensors, mode=mode, impl=impl).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_leaves, leaves = leaves_of(inputs), leaves_of(inputs)
    eager, ours = loss(*eager_leaves), compiled(*leaves)
    torch.testing.assert_close(ours, eager)
    expected = torch.autograd.grad(eager, eager_leaves)
    for theirs, grad in zip(expected, torch.autograd.grad(ours, leaves), strict=True):
        torch.testing.assert_close(grad, theirs)


def test_flops_are_counted() -> None:
    leaves = leaves_of(make_inputs(2, 24, 5, 8, 16, 3))
    tokens = 2 * 4 * 40  # of all routes
    x_proj, dt_proj, updates = 2 * tokens * 24 * (3 + 32), 2 * tokens * 24 * 3, tokens * 24 * 16
    with FlopCounterMode(display=False) as counter:
        out = cross_selective_scan(*leaves)
    assert counter.get_total_flops() == x_proj + dt_proj + 9 * updates
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * x_proj + 3 * dt_proj + 23 * updates


# ---- errors ----------------------------------------------------------------------------------------------------------


def _replacing(name: str, value: Tensor, message: str) -> Any:
    return pytest.param(name, value, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        _replacing("x", torch.zeros(6, 5, 4), r"x is \(B, E, H, W\), none but B 0; got \(6, 5, 4\)"),
        _replacing("x", torch.zeros(1, 6, 0, 4), r"none but B 0; got \(1, 6, 0, 4\)"),
        _replacing("x", torch.zeros(1, 6, 5, 4).long(), "x is float32, bfloat16 or float16; got torch.int64"),
        _replacing("x", torch.zeros(1, 6, 5, 4).double(), "with a float64 x every input is float64; got x_proj"),
        _replacing("x_proj", torch.zeros(4, 12, 6), r"x_proj is \(K, R \+ 2N, E\) = \(4, 11, 6\) .*; got \(4, 12, 6\)"),
        _replacing("dt_proj", torch.zeros(4, 5, 3), r"dt_proj is \(K, E, R\) with K = 4 routes \(h, v, h_flip, v_flip"),
        _replacing("dt_proj", torch.zeros(4, 6, 0), r"dt_proj is \(K, E, R\) .*; got \(4, 6, 0\)"),
        _replacing("dt_bias", torch.zeros(24), r"dt_bias is \(K, E\) with .* x's E = 6; got \(24,\)"),
        _replacing("D", torch.zeros(4, 6, device="meta"), "all tensors are on one device; got x on cpu and D on meta"),
        _replacing("A", torch.zeros(4, 6, 4).half(), "A is float32, .*; got torch.float16"),
        _replacing("A", torch.zeros(2, 6, 4), r"A is \(K, E, N\) with K = 4 routes .*; got \(2, 6, 4\)"),
        _replacing("D", torch.zeros(4, 6).int(), "D is float32, bfloat16 or float16; got torch.int32"),
    ],
)
def test_bad_input_is_named(name: str, value: Tensor, message: str) -> None:
    inputs = make_inputs(1, 6, 5, 4, 4)
    inputs[NAMES.index(name)] = value
    with pytest.raises(ValueError, match=f"^cross_selective_scan: .*{message}"):
        cross_selective_scan(*inputs)


def test_number_of_weights_and_routes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"dt_proj is \(K, E, R\) with K = 2 routes \(h, w2\) .*; got \(4, 6, 3\)"):
        cross_selective_scan(*make_inputs(1, 6, 5, 4, 4), mode=("h", "w2"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("diagonal", r"mode is one of cross, unidirectional, bidirectional, cascade, or a sequence .*; got 'diagonal'"),
        (("h", "diagonal"), "a route is h, v, or w and the size of a window .*; got 'diagonal'"),
        (("w0",), "got 'w0'"),
        (("w",), "got 'w'"),
        (("h_flip_flip",), "got 'h_flip_flip'"),
        ((), "mode names at least one route"),
    ],
)
def test_bad_mode_is_named(mode: Mode, message: str) -> None:
    inputs = make_inputs(1, 6, 5, 4, 4)
    for op, call in (
        ("cross_selective_scan", lambda: cross_selective_scan(*inputs, mode=mode)),
        ("cross_scan", lambda: cross_scan(inputs[0], mode)),
        ("cross_merge", lambda: cross_merge(inputs[0].unsqueeze(1), mode=mode)),
    ):
        with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
            call()


def test_cascade_has_no_sequences_to_show() -> None:
    x = torch.zeros(1, 4, 6, 5, 4)
    with pytest.raises(ValueError, match=r"^cross_scan: in 'cascade' .* Use cross_selective_scan"):
        cross_scan(x[0], "cascade")
    with pytest.raises(ValueError, match=r"^cross_merge: in 'cascade' .* Use cross_selective_scan"):
        cross_merge(x, mode="cascade")


def test_bad_maps_and_sequences_are_named() -> None:
    with pytest.raises(ValueError, match=r"^cross_scan: x is \(B, E, H, W\), none but B 0; got \(6, 5, 4\)"):
        cross_scan(torch.zeros(6, 5, 4))
    with pytest.raises(ValueError, match=r"^cross_merge: y is .* each of the 4 routes h, v, .*; got \(1, 3, 6, 20\)"):
        cross_merge(torch.zeros(1, 3, 6, 20), (5, 4))
    with pytest.raises(ValueError, match=r"^cross_merge: y of shape \(1, 4, 6, 20\) does not say its map. Give size"):
        cross_merge(torch.zeros(1, 4, 6, 20))
    with pytest.raises(ValueError, match=r"^cross_merge: H W is the length of the sequences, 20; got size \(4, 4\)"):
        cross_merge(torch.zeros(1, 4, 6, 20), (4, 4))
    with pytest.raises(ValueError, match=r"^cross_merge: size is that of y's last two sizes, \(5, 4\); got \(4, 5\)"):
        cross_merge(torch.zeros(1, 4, 6, 5, 4), (4, 5))


@pytest.mark.parametrize(("impl", "message"), [("triton", "takes CUDA tensors; got cpu"), ("cuda", "impl is one of")])
def test_bad_impl_is_named(impl: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cross_selective_scan: .*{message}"):
        cross_selective_scan(*make_inputs(1, 6, 5, 4, 4), impl=impl)
