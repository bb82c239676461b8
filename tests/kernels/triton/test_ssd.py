"""The Triton kernels of the SSD against a recurrence in float64, values and every gradient."""

import pytest
import torch
from torch import Tensor

from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.ssd.op import run_kernel, ssd_backward_op, ssd_op

NAMES = ("x", "B", "C", "D", "dt", "A", "dt_backward", "A_backward")


def make_inputs(
    batch: int, tokens: int, heads: int, channels: int, groups: int, state: int, *, dtype: torch.dtype = torch.float32,
    directions: str = "both", skip: bool = True, chunk: int | None = 16, scale: float = 0.5, largest_step: float = 1.0,
    wide: bool = False,
) -> SSDInputs:  # fmt: skip
    """Draw inputs as an encoder has them: x, B and C are slices of one tensor, steps of both directions too."""
    widths = (heads * channels, groups * state, groups * state)
    x, B, C = torch.randn(batch, tokens, sum(widths)).to(dtype).split(widths, dim=-1)
    steps = largest_step * torch.rand(batch, tokens, 2 * heads)
    ahead, back = directions != "backward", directions != "forward"
    return SSDInputs(
        x.unflatten(-1, (heads, channels)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state)),
        torch.randn(heads) if skip else None,
        steps[..., ::2] if ahead else None, -2 * torch.rand(heads) - 0.1 if ahead else None,
        steps[..., 1::2] if back else None, -2 * torch.rand(heads) - 0.1 if back else None,
        scale, chunk, wide,
    )  # fmt: skip


def recurrence(inputs: SSDInputs) -> Tensor:
    """Compute y in float64, one token after the other, from the formula of `ssd`."""
    x, B, C = inputs.x, inputs.B, inputs.C
    batch, tokens, heads, channels, groups, state = inputs.sizes
    B, C = (rows.repeat_interleave(heads // groups, dim=2) for rows in (B, C))
    y = torch.zeros_like(x)
    for dt, A, reverse in inputs.directions:
        h = x.new_zeros(batch, heads, state, channels)
        outputs = []
        for t in range(tokens)[:: -1 if reverse else 1]:
            drive = torch.einsum("bh,bhn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
            h = (dt[:, t] * A).exp()[..., None, None] * h + drive
            outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], h))
        y = y + inputs.scale * torch.stack(outputs[:: -1 if reverse else 1], dim=1)
    return y if inputs.D is None else y + inputs.D[:, None] * x


def with_gradients(inputs: SSDInputs, dy: Tensor, impl: str, device: str | torch.device) -> dict[str, Tensor]:
    """Return y and the gradient of every input."""
    double = impl == "recurrence"
    leaves = [
        None if t is None else (t.double() if double else t.to(device)).detach().requires_grad_() for t in inputs[:8]
    ]
    named = SSDInputs(*leaves, *inputs[8:])
    y = recurrence(named) if double else run_kernel(named, True, impl)
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, present, dy.to(y.device, y.dtype))
    names = [name for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None]
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}


def compare(inputs: SSDInputs, device: torch.device, float32: float = 1e-5) -> None:
    dy = torch.randn(inputs.x.shape).to(inputs.x.dtype)
    expected = with_gradients(inputs, dy, "recurrence", "cpu")
    found = with_gradients(inputs, dy, "triton", device)
    # operands of products are rounded to the dtype of x: the square root of two roundings, twice
    tolerance = {torch.float32: float32, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[inputs.x.dtype]
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        error = (found[name].cpu().double() - exact).norm()
        assert error <= tolerance * exact.norm(), (name, error / exact.norm())


SHAPES = [  # batch, tokens, heads, channels, groups, state
    (2, 1, 1, 3, 1, 2),
    (1, 15, 2, 16, 1, 4),
    (1, 16, 2, 4, 2, 16),
    (1, 17, 4, 5, 2, 17),
    (1, 40, 2, 17, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_a_recurrence_in_float64(device: torch.device, shape: tuple[int, ...]) -> None:
    compare(make_inputs(*shape), device)


@pytest.mark.parametrize("directions", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [5, 20])
def test_one_direction_without_skip_agrees(device: torch.device, directions: str, tokens: int) -> None:
    compare(make_inputs(1, tokens, 2, 5, 1, 3, directions=directions, skip=False, scale=1.0), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees(device: torch.device, dtype: torch.dtype) -> None:
    compare(make_inputs(1, 36, 2, 16, 1, 16, dtype=dtype, wide=dtype == torch.float16), device)


def test_blocks_of_a_chunk_read_one_another(device: torch.device) -> None:
    """Chunks of 48 tokens are three blocks of 16; the second chunk is one block and a part of another."""
    compare(make_inputs(1, 72, 1, 4, 1, 3, chunk=48), device)


def test_large_steps_stay_finite_and_right(device: torch.device) -> None:
    """Logarithms of decays down to -1000 a step, between steps that hardly decay."""
    inputs = make_inputs(1, 36, 1, 4, 1, 3, chunk=32)
    for dt in (inputs.dt, inputs.dt_backward):
        assert dt is not None
        dt[:, ::5] = 500.0
    compare(inputs, device, float32=6e-5)  # one unit in the last place of a sum of four log2 exp(-100)


def test_wide_states_are_multiplied_in_slices(device: torch.device) -> None:
    compare(make_inputs(1, 17, 1, 3, 1, 66), device)


def test_channels_are_cut_into_tiles(device: torch.device) -> None:
    compare(make_inputs(1, 17, 2, 130, 1, 1), device)


def test_any_strides_are_read(device: torch.device) -> None:
    inputs = make_inputs(2, 7, 2, 4, 1, 3)
    flipped = [None if t is None else t.mT.contiguous().mT if t.ndim == 4 else t for t in inputs[:8]]
    compare(SSDInputs(*flipped, *inputs[8:]), device)


def test_results_are_the_same_bits_every_time(device: torch.device) -> None:
    inputs = make_inputs(1, 20, 2, 5, 1, 3)
    first, second = (with_gradients(inputs, torch.ones(inputs.x.shape), "triton", device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_operators_pass_opcheck(device: torch.device) -> None:
    inputs = make_inputs(1, 18, 2, 3, 1, 2)
    leaves = [None if t is None else t.detach().to(device).contiguous().requires_grad_() for t in inputs[:8]]
    checks = ("test_schema", "test_faketensor")  # the others compile graphs, which test_ssd.py does for both kernels
    torch.library.opcheck(ssd_op, (*leaves, *inputs[8:], True, "triton"), test_utils=checks)
    tensors = [None if t is None else t.detach() for t in leaves]
    y, states = ssd_op(*tensors, *inputs[8:], True, "triton")
    arguments = (torch.ones_like(y), states, *tensors, *inputs[8:], "triton")
    torch.library.opcheck(ssd_backward_op, arguments, test_utils=checks)
