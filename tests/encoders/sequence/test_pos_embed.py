import math

import pytest
import torch
import torch.nn.functional as F

import ssmpretrain
from ssmpretrain.encoders.sequence.class_token import remove_class_tokens
from ssmpretrain.encoders.sequence.pos_embed import resize_grid, resize_pos_embed, sincos_pos_embed

KINDS = ["middle", "head", "double", "none"]
CLASS_ROWS = {"middle": 1, "head": 1, "double": 2, "none": 0}


def test_the_middle_row_is_the_class_tokens_and_the_grid_has_no_gap():
    table = torch.arange(197.0).view(1, 197, 1)
    grid, class_row = remove_class_tokens(table, "middle")
    assert class_row.item() == 98
    assert grid.flatten().tolist() == [*range(98), *range(99, 197)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_grid_returns_the_table_itself(kind):
    table = torch.randn(1, 12 + CLASS_ROWS[kind], 4)
    assert resize_pos_embed(table, (3, 4), (3, 4), kind) is table


@pytest.mark.parametrize("kind", KINDS)
def test_class_rows_keep_their_values_and_move_to_the_new_places(kind):
    table = torch.randn(1, 196 + CLASS_ROWS[kind], 4)
    resized = resize_pos_embed(table, (14, 14), (24, 20), kind)
    assert resized.shape == (1, 480 + CLASS_ROWS[kind], 4)
    assert torch.equal(remove_class_tokens(resized, kind)[1], remove_class_tokens(table, kind)[1])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_ramp_stays_a_ramp(axis):
    old, new = (14, 14), (28, 28)
    ramp = torch.arange(14.0).view(14, 1) if axis == 0 else torch.arange(14.0).view(1, 14)
    grid = ramp.expand(14, 14).reshape(1, 196, 1)
    resized = resize_grid(grid, old, new).view(28, 28)
    # Pixel centres: row i of 28 lies at (i + 0.5) / 2 - 0.5 of 14. Near the edge the kernel meets the clamped border.
    expected = (torch.arange(28.0) + 0.5) / 2 - 0.5
    along = resized[:, 14] if axis == 0 else resized[14]
    # PyTorch's cubic kernel (a = -0.75) leaves a ramp by 3/64 of a step.
    torch.testing.assert_close(along[4:-4], expected[4:-4], atol=3 / 64 + 1e-5, rtol=0)
    across = resized[14] if axis == 0 else resized[:, 14]
    torch.testing.assert_close(across, across[:1].expand(28), atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [(28, 28), (7, 31), (1, 14), (13, 3), (56, 1)])
def test_resizing_gives_the_numbers_of_interpolate_as_published(new):
    grid = torch.randn(1, 14 * 14, 5, requires_grad=True)
    image = grid.reshape(1, 14, 14, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=new, mode="bicubic").flatten(2).mT
    torch.testing.assert_close(resize_grid(grid, (14, 14), new), expected, rtol=1e-5, atol=1e-5)
    passed = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, grid, passed)[0] for y in (resize_grid(grid, (14, 14), new), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)  # sums of up to sixteen


def test_autocast_changes_nothing():
    grid = torch.randn(1, 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_grid(grid, (4, 4), (8, 5))
    assert torch.equal(resized, resize_grid(grid, (4, 4), (8, 5)))


@pytest.mark.slow
def test_a_compiled_embedding_trains_on_images_of_every_size():
    encoder = ssmpretrain.create_encoder("test_vim", num_classes=2)
    compiled = torch.compile(encoder.embed, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (48, 64), (64, 32)):
        images = torch.randn(2, 3, *size)
        gradients = []
        for run in (encoder.embed, compiled):
            (gradient,) = torch.autograd.grad(run(images).square().sum(), encoder.pos_embed)
            gradients.append(gradient)
        torch.testing.assert_close(*gradients)


def test_resizing_keeps_the_dtype_and_computes_in_float32():
    grid = torch.randn(1, 16, 2, dtype=torch.bfloat16)
    resized = resize_grid(grid, (4, 4), (8, 8))
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_grid(grid.float(), (4, 4), (8, 8)).bfloat16())


def test_rows_of_the_sine_cosine_table_are_what_the_formula_says():
    table = sincos_pos_embed(8, (3, 5))
    assert table.shape == (1, 15, 8)
    row, column = 2, 3
    frequencies = [1.0, 10000.0**-0.5]
    expected = [wave(at * w) for at in (column, row) for wave in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(table[0, row * 5 + column], torch.tensor(expected))


def test_a_width_that_cannot_hold_four_waves_is_refused():
    with pytest.raises(ValueError, match="divisible by 4; got 6"):
        sincos_pos_embed(6, (2, 2))
