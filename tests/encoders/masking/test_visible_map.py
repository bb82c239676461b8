import pytest
import torch
from torch import Tensor, nn

from ssmpretrain.encoders.masking.visible_map import VisibleMap, blank_hidden
from ssmpretrain.kernels.cross_scan import packed_orders

GRID = (3, 5)
KEEP = torch.tensor([[0, 6, 7, 14], [2, 3, 8, 13]])  # corners, neighbours and a patch by itself
CONVOLUTIONS = {  # and how many positions of the output there are for one of the input, along a side
    "depthwise 3x3": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), 1),
    "depthwise 5x5 without bias": (lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False), 1),
    "3x3 with stride 2": (lambda: nn.Conv2d(4, 6, 3, 2, 1), 2),
    "2x2 without bias": (lambda: nn.Conv2d(4, 6, 2, 2, bias=False), 2),
    "4x4": (lambda: nn.Conv2d(4, 6, 4, 4), 4),
}


def visible_positions(keep: Tensor, grid: tuple[int, int], scale: int) -> list[list[int]]:
    """Raster indices per image, from nested loops."""
    width = grid[1] * scale
    return [
        [
            row * width + column
            for row in range(grid[0] * scale)
            for column in range(width)
            if row // scale * grid[1] + column // scale in image
        ]
        for image in keep.tolist()
    ]


def zeros_at_hidden(x: Tensor, visible: VisibleMap) -> Tensor:
    """(B, H, W, C) with zeros at hidden positions."""
    hidden = torch.ones(x.shape[:3], dtype=torch.bool).flatten(1)
    for image, positions in enumerate(visible.positions.tolist()):
        hidden[image, positions] = False
    return x.masked_fill(hidden.view(*x.shape[:3], 1), 0)


@pytest.mark.parametrize("grid", [GRID, (1, 15), (15, 1)], ids=str)
def test_positions_are_those_of_nested_loops(grid):
    for scale in (1, 2, 3, 8):
        visible = VisibleMap(KEEP, grid, scale)
        expected = visible_positions(KEEP, grid, scale)
        assert visible.size == (grid[0] * scale, grid[1] * scale)
        assert visible.positions.tolist() == expected, scale
        positions = grid[0] * grid[1] * scale**2
        assert visible.rows.tolist() == [image * positions + p for image in range(2) for p in expected[image]], scale


def test_orders_are_made_once_for_a_scan():
    visible = VisibleMap(KEEP, GRID, 2)
    orders = visible.orders("cross")
    assert visible.orders("cross") is orders
    expected = packed_orders(visible.positions, 6, 10)
    assert orders.keys() == expected.keys() == {"v"}
    assert all(torch.equal(a, b) for a, b in zip(orders["v"], expected["v"], strict=True))
    assert visible.orders(("w2", "h")).keys() == {"w2"}


def test_packing_takes_the_visible_positions_and_unpacking_puts_them_back():
    visible = VisibleMap(KEEP, GRID, 2)
    x = torch.randn(2, 6, 10, 3)
    packed = visible.pack(x)
    assert packed.shape == (2, 1, 16, 3)
    for image in range(2):
        assert torch.equal(packed[image, 0], x[image].flatten(0, 1)[visible.positions[image]])
    assert torch.equal(visible.unpack(packed), zeros_at_hidden(x, visible))
    assert torch.equal(visible.pack(visible.unpack(packed)), packed)


def test_gradients_of_packing_and_unpacking_are_each_others_values():
    visible = VisibleMap(KEEP, GRID, 2)
    x, packed = torch.randn(2, 6, 10, 3, requires_grad=True), torch.randn(2, 1, 16, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(visible.pack(x), x, packed)[0], visible.unpack(packed))
    assert torch.equal(torch.autograd.grad(visible.unpack(packed), packed, x)[0], visible.pack(x))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_sees_zeros_at_hidden_positions(kind):
    make, ratio = CONVOLUTIONS[kind]
    conv = make().double()
    source, target = VisibleMap(KEEP, GRID, 4), VisibleMap(KEEP, GRID, 4 // ratio)
    x = torch.randn(2, 12, 20, 4, dtype=torch.float64)
    packed = source.pack(x).permute(0, 3, 1, 2).requires_grad_()
    leaves = [packed, *conv.parameters()]
    ours = source.convolve(conv, packed, target)
    assert ours.permute(0, 2, 3, 1).is_contiguous()
    whole = x.requires_grad_()
    y = conv(zeros_at_hidden(whole, source).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = target.pack(y).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected)

    grad = torch.randn_like(ours)
    dx, *dparameters = torch.autograd.grad(ours, leaves, grad)
    dwhole, *expected_dparameters = torch.autograd.grad(expected, [whole, *conv.parameters()], grad)
    torch.testing.assert_close(dx, source.pack(dwhole).permute(0, 3, 1, 2))
    torch.testing.assert_close(dparameters, expected_dparameters)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_passes_gradcheck(kind):
    make, ratio = CONVOLUTIONS[kind]
    conv, keep = make().double(), torch.tensor([[0, 2], [1, 2]])
    source, target = VisibleMap(keep, (2, 2), 4), VisibleMap(keep, (2, 2), 4 // ratio)
    x = torch.randn(2, 4, 1, 32, dtype=torch.float64, requires_grad=True)

    leaves = (x, *conv.parameters())  # which gradcheck changes in place
    assert torch.autograd.gradcheck(lambda *_: source.convolve(conv, x, target), leaves, fast_mode=True)


def test_unpacking_keeps_nothing_but_where_the_rows_go():
    visible, packed, kept = VisibleMap(KEEP, GRID, 2), torch.randn(2, 1, 16, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        visible.unpack(packed)
    assert all(t.data_ptr() == visible.rows.data_ptr() for t in kept)


def test_a_convolution_keeps_the_visible_positions_alone():
    source, conv = VisibleMap(KEEP, GRID, 8), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    x, kept = torch.randn(2, 256, 16).view(2, 1, 256, 16).permute(0, 3, 1, 2).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        source.convolve(conv, x, source)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, conv.weight, source.rows)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_and_the_weight_say_what_a_convolution_computes_in(dtype):
    source, conv = VisibleMap(KEEP, GRID, 2), nn.Conv2d(4, 4, 3, padding=1).to(dtype)
    x = torch.randn(2, 4, 1, 16, dtype=dtype)
    whole = source.unpack(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert source.convolve(conv, x, source).dtype == conv(whole).dtype
    assert source.convolve(conv, x.float(), source).dtype == dtype


@pytest.mark.slow
def test_a_convolution_compiles_without_graph_breaks():
    source, target, conv = VisibleMap(KEEP, GRID, 2), VisibleMap(KEEP, GRID, 1), nn.Conv2d(4, 6, 3, 2, 1)
    x = torch.randn(2, 4, 1, 16)

    def convolve(x: Tensor) -> Tensor:
        return source.convolve(conv, x, target).square().mean()

    results = []
    for run in (convolve, torch.compile(convolve, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *conv.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("content", [1e30, torch.inf, torch.nan])
def test_hidden_pixels_become_zeros_whatever_they_hold(content):
    images = torch.randn(2, 3, 12, 20)
    pixels = VisibleMap(KEEP, GRID, 4)
    expected = zeros_at_hidden(images.permute(0, 2, 3, 1), pixels).permute(0, 3, 1, 2)
    hidden = expected.eq(0)
    spoilt = torch.where(hidden, content, images).requires_grad_()
    blanked = blank_hidden(spoilt, KEEP, GRID)
    assert torch.equal(blanked, expected)
    (grad,) = torch.autograd.grad(blanked.square().sum(), spoilt)
    assert torch.equal(grad, 2 * expected)
