from typing import Any

import pytest
import torch
from bidirectional_scans import compare, leaves_of, make_inputs, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.bidirectional_scan.op import bidirectional_scan_backward_op, bidirectional_scan_op
from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks

SHAPES = [  # batch, channels, tokens, state, rank, taps
    (2, 5, 1, 3, 2, 4),
    (1, 17, 2, 16, 3, 4),
    (2, 24, 63, 1, 5, 3),
    (1, 384, 197, 16, 12, 4),
    (3, 24, 197, 20, 1, 2),
    (13, 17, 9, 8, 4, 1),
    (1, 5, 1000, 16, 2, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_forward_and_backward(shape: tuple[int, ...]) -> None:
    compare(*make_inputs(*shape), impl="cpu")


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_chunked_scan_inside_agrees_with_the_reference(shape: tuple[int, ...]) -> None:
    compare(*make_inputs(*shape), scan=scan_in_chunks)


def test_one_direction_agrees_with_the_reference() -> None:
    xz, first, _ = make_inputs(2, 24, 70, 16)
    compare(xz, first, None)


def test_sum_is_halved_only_when_asked() -> None:
    xz, first, second = make_inputs(2, 24, 70, 16)
    compare(xz, first, second, divide_output=False)
    whole = bidirectional_scan(xz, first, second, divide_output=False)
    assert torch.equal(bidirectional_scan(xz, first, second), 0.5 * whole)
    assert torch.equal(bidirectional_scan(xz, first), bidirectional_scan(xz, first, divide_output=False))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_backward_direction_is_the_flipped_scan_of_flipped_tokens(impl: Any) -> None:
    xz, first, second = make_inputs(2, 24, 70, 16)
    expected = bidirectional_scan(xz, first, impl=impl) + bidirectional_scan(xz.flip(1), second, impl=impl).flip(1)
    ours = bidirectional_scan(xz, first, second, divide_output=False, impl=impl)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # two sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_meet_half_precision_tokens(dtype: torch.dtype) -> None:
    xz, first, second = make_inputs(2, 40, 70, 16, 6)
    compare(xz.to(dtype), first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_are_used_in_the_dtype_of_the_tokens_and_the_rest_in_float32(dtype: torch.dtype) -> None:
    xz, first, second = make_inputs(1, 24, 40, 4)
    xz = xz.to(dtype)
    ours = bidirectional_scan(xz, first, second)
    rounded = [
        d._replace(x_proj=d.x_proj.to(dtype).float(), dt_proj=d.dt_proj.to(dtype).float()) for d in (first, second)
    ]
    assert torch.equal(ours, bidirectional_scan(xz, *rounded))
    for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D"):
        changed = first._replace(**{name: getattr(first, name).to(dtype).float()})
        assert not torch.equal(ours, bidirectional_scan(xz, changed, second)), name


def test_half_precision_parameters_get_gradients_in_their_dtype() -> None:
    xz, first, second = make_inputs(2, 24, 30, 16)
    first, second = (
        ScanDirection(*(t if n == "A" else t.bfloat16() for n, t in d._asdict().items())) for d in (first, second)
    )
    compare(xz.bfloat16(), first, second)


def test_autocast_changes_nothing() -> None:
    xz, first, second = make_inputs(2, 24, 30, 16)
    for impl in ("cpu", "reference"):
        expected = bidirectional_scan(xz, first, second, impl=impl)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bidirectional_scan(xz, first, second, impl=impl), expected)  # type: ignore[arg-type]


def test_any_strides_are_read() -> None:
    xz, first, second = make_inputs(2, 24, 30, 16)
    dense = bidirectional_scan(xz, first, second)
    for strided in (
        xz.mT.contiguous().mT,
        torch.stack([xz, xz], -1)[..., 0],
        xz.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not strided.is_contiguous()
        assert torch.equal(bidirectional_scan(strided, first, second), dense)
    compare(strided, first, second)


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    inputs = make_inputs(2, 40, 130, 16, 5)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        leaves = leaves_of(*inputs)
        out = run(bidirectional_scan, leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_working_memory_left_by_another_call_does_not_matter() -> None:
    inputs = make_inputs(1, 24, 50, 16)
    clean = bidirectional_scan(*inputs)
    xz, first, second = make_inputs(2, 48, 100, 16)
    poison = torch.full_like(xz, torch.nan).requires_grad_()
    bidirectional_scan(poison, first, second).sum().backward()
    assert poison.grad is not None and poison.grad.isnan().any()
    assert torch.equal(bidirectional_scan(*inputs), clean)
    compare(*inputs)


def test_huge_steps_forget_everything_without_nan() -> None:
    xz, first, second = make_inputs(1, 24, 40, 16)
    huge = [d._replace(dt_bias=torch.full_like(d.dt_bias, 1e4)) for d in (first, second)]
    leaves = leaves_of(xz, *huge)
    out = run(bidirectional_scan, leaves)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


def test_reference_passes_gradcheck() -> None:
    leaves = leaves_of(*make_inputs(1, 3, 4, 2, 2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: run(bidirectional_scan, list(tensors)), leaves, fast_mode=True)


def test_operators_pass_opcheck() -> None:
    # 16 channels: the kept states then have no padding, whose content is free, and can be compared
    xz, *parameters = leaves_of(*make_inputs(2, 16, 30, 4))
    torch.library.opcheck(bidirectional_scan_op, (xz, parameters, True, True, "native"))
    detached = [p.detach() for p in parameters]
    torch.library.opcheck(bidirectional_scan_op, (xz.detach(), detached, True, False, "native"))
    out, x_dbl, states = bidirectional_scan_op(xz.detach(), detached, True, True, "native")
    torch.library.opcheck(bidirectional_scan_backward_op, (out, x_dbl, states, xz.detach(), detached, True, "native"))


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(2, 24, 40, 16)

    def loss(*tensors: Tensor) -> Tensor:
        return run(bidirectional_scan, list(tensors)).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_leaves, leaves = leaves_of(*inputs), leaves_of(*inputs)
    eager, ours = loss(*eager_leaves), compiled(*leaves)
    torch.testing.assert_close(ours, eager)
    expected = torch.autograd.grad(eager, eager_leaves)
    for theirs, grad in zip(expected, torch.autograd.grad(ours, leaves), strict=True):
        torch.testing.assert_close(grad, theirs)


def test_flops_are_counted() -> None:
    leaves = leaves_of(*make_inputs(2, 24, 40, 16, 3, 4))
    tokens = 2 * 2 * 40  # both directions
    conv, x_proj, dt_proj = (2 * tokens * size for size in (24 * 4, 24 * (3 + 32), 24 * 3))
    with FlopCounterMode(display=False) as counter:
        out = run(bidirectional_scan, leaves)
    assert counter.get_total_flops() == conv + x_proj + dt_proj + 9 * tokens * 24 * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * conv + 2 * x_proj + 3 * dt_proj + 23 * tokens * 24 * 16


def _replacing(name: str, value: Tensor, message: str) -> Any:
    return pytest.param(name, value, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        _replacing("xz", torch.zeros(10, 12), r"xz is \(B, L, 2E\), .*; got \(10, 12\)"),
        _replacing("xz", torch.zeros(1, 10, 13), r"xz is \(B, L, 2E\), .*; got \(1, 10, 13\)"),
        _replacing("xz", torch.zeros(1, 0, 12), r"none but B 0; got \(1, 0, 12\)"),
        _replacing("xz", torch.zeros(1, 10, 12).long(), "xz is float32, bfloat16 or float16; got torch.int64"),
        _replacing("conv_weight", torch.zeros(6, 1, 4), r"forward.conv_weight is \(E, W\) with E = 6"),
        _replacing("conv_bias", torch.zeros(5), r"forward.conv_bias is \(E,\) with E = 6, .*; got \(5,\)"),
        _replacing("x_proj", torch.zeros(12, 6), r"forward.x_proj is \(R \+ 2N, E\) = \(11, 6\)"),
        _replacing("dt_proj", torch.zeros(5, 3), r"forward.dt_proj is \(E, R\) with E = 6"),
        _replacing(
            "dt_bias", torch.zeros(6, device="meta"), "all tensors are on one device; got xz on cpu and forward.dt_bias"
        ),
        _replacing("A", torch.zeros(6, 4).half(), "forward.A is float32, .*; got torch.float16"),
        _replacing("D", torch.zeros(6).int(), "forward.D is float32, bfloat16 or float16; got torch.int32"),
    ],
)
def test_bad_input_is_named(name: str, value: Tensor, message: str) -> None:
    xz, first, second = make_inputs(1, 6, 10, 4)
    if name == "xz":
        xz = value
    else:
        first = first._replace(**{name: value})
    with pytest.raises(ValueError, match=f"^bidirectional_scan: .*{message}"):
        bidirectional_scan(xz, first, second)


def test_directions_of_different_shapes_are_named() -> None:
    xz, first, _ = make_inputs(1, 6, 10, 4)
    _, _, second = make_inputs(1, 6, 10, 4, taps=3)
    with pytest.raises(ValueError, match=r"got conv_weight \(6, 4\) forward and \(6, 3\) backward"):
        bidirectional_scan(xz, first, second)


@pytest.mark.parametrize(("impl", "message"), [("triton", "takes CUDA tensors; got cpu"), ("cuda", "impl is one of")])
def test_bad_impl_is_named(impl: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^bidirectional_scan: .*{message}"):
        bidirectional_scan(*make_inputs(1, 6, 10, 4), impl=impl)
