"""A projection computes the same in every way, and takes the one that suits the processor."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.encoders.layers import projection
from ssmpretrain.encoders.layers.projection import ProcessorTraits, Projection, linear

AVX512 = dict.fromkeys(["avx2", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"], True)
AVX2 = AVX512 | dict.fromkeys(["avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"], False)


@pytest.mark.parametrize(
    ("machine", "vendor", "instructions", "traits"),
    [
        ("x86_64", "GenuineIntel", AVX512, (True, False)),
        ("x86_64", "AuthenticAMD", AVX512, (True, True)),
        ("x86_64", "AuthenticAMD", AVX2, (False, False)),
        ("x86_64", "GenuineIntel", AVX2, (False, False)),
        ("x86_64", "GenuineIntel", AVX2 | {"avx_ne_convert": True}, (True, False)),
        ("x86_64", "GenuineIntel", AVX512 | {"avx512_bw": False}, (False, False)),  # Knights Landing
        ("AMD64", "", AVX2, (False, False)),  # Windows
        ("aarch64", "", {"bf16": True}, (True, False)),
        ("arm64", "", {}, (True, False)),
    ],
)
def test_the_processor_decides(
    machine: str, vendor: str, instructions: dict[str, bool], traits: tuple[bool, bool]
) -> None:
    assert ProcessorTraits.of(machine, vendor, instructions) == traits


def test_this_processor_is_recognised() -> None:
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert projection.PROCESSOR.has_bfloat16 == supported or projection.PROCESSOR == (True, False)  # not x86-64


@pytest.fixture(params=[(True, False), (True, True), (False, False)], ids=["Intel", "Zen 4", "Zen 3"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(projection, "PROCESSOR", ProcessorTraits(*request.param))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all inputs for a fixed incoming gradient."""
    grad = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 5, 16), (2, 3, 5, 16), (0, 5, 16)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_way_computes_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(24, 16), *([torch.randn(24)] if bias else [])]
    exact = [one.double().requires_grad_() for one in inputs]
    truth = results(F.linear(*exact), exact)
    for dtype in (torch.float32, torch.bfloat16):
        given = [one.to(dtype).requires_grad_() for one in inputs]
        found = results(linear(*given), given)
        bound = 1e-6 if dtype == torch.float32 else 1.5e-2  # roundings of inputs and results to 2^-24 and 2^-9
        for one, other, is_gradient in zip(found, truth, [False, True, True, True], strict=False):
            assert one.dtype == dtype and one.shape == other.shape, is_gradient
            assert (one.double() - other).norm() <= bound * other.norm()


@pytest.mark.usefixtures("_processor")
def test_autocast_sets_the_dtype_of_the_result_and_not_of_the_gradients() -> None:
    torch.manual_seed(0)
    layer, x = Projection(16, 24), torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.dtype == torch.bfloat16 and (y.double() - expected).norm() < 1.5e-2 * expected.norm()
    found = torch.autograd.grad(y.float().sum(), [x, layer.weight])
    assert [one.dtype for one in found] == [torch.float32] * 2
    layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64


def test_a_processor_without_bfloat16_products_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "PROCESSOR", ProcessorTraits(False, False))
    seen: list[torch.dtype] = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or real(x, *rest))
    linear(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.ones(2, 4), torch.ones(3, 4))
    assert seen == [torch.float32] * 2


def test_a_convolution_needs_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "PROCESSOR", ProcessorTraits(True, True))
    calls: list[int] = []
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *rest: calls.append(torch.get_num_threads()) or real(x, *rest))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            linear(torch.ones(2, 4), torch.ones(3, 4))
    finally:
        torch.set_num_threads(before)
    assert calls == [2]


@pytest.mark.usefixtures("_processor")
def test_operands_of_two_dtypes_are_refused_as_by_pytorch() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.ones(2, 4), torch.ones(3, 4, dtype=torch.bfloat16))
