"""Necks: values against PyTorch's functions, odd sizes, and the errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.necks import MultiScale, SimpleFeaturePyramid


def maps_of(height, width, channels=8, count=4):
    torch.manual_seed(0)
    return [torch.randn(2, channels, height, width) for _ in range(count)]


def doubled(x, conv):
    """Write each value times a weight into 2 x 2 positions: a transposed convolution without overlap."""
    blocks = torch.einsum("bchw,cdij->bdhiwj", x, conv.weight)
    return blocks.reshape(len(x), -1, 2 * x.shape[2], 2 * x.shape[3]) + conv.bias.view(1, -1, 1, 1)


@torch.no_grad()
def test_stride_16_is_doubled_twice_and_once_kept_and_halved():
    neck, maps = MultiScale([8] * 4, [16] * 4).eval(), maps_of(3, 5)
    assert (neck.strides, neck.channels) == ([4, 8, 16, 32], [8] * 4)
    first, norm, _, second = neck.scales[0]
    assert isinstance(norm, nn.BatchNorm2d)
    found = neck(maps)
    torch.testing.assert_close(found[0], doubled(F.gelu(norm(doubled(maps[0], first))), second))
    torch.testing.assert_close(found[1], doubled(maps[1], neck.scales[1]))
    torch.testing.assert_close(found[2], maps[2], rtol=0, atol=0)
    assert found[3].shape == (2, 8, 2, 3)
    assert found[3][0, 0, 1, 2] == maps[3][0, 0, 2, 4], "the corner of an odd map is a maximum of one position"
    torch.testing.assert_close(found[3][:, :, :1, :2], F.max_pool2d(maps[3], 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stride", "strides"), [(8, [4, 8, 16, 32]), (4, [4, 8, 16, 32]), (14, [7, 14, 28, 56]), (32, [8, 16, 32, 64])]
)
def test_other_strides_are_scaled_by_the_same_rule(stride, strides):
    neck = MultiScale([8] * 4, [stride] * 4)
    assert neck.strides == strides
    for one, its_stride in zip(neck(maps_of(8, 16)), strides, strict=True):
        assert tuple(one.shape[2:]) == (8 * stride // its_stride, 16 * stride // its_stride)


@torch.no_grad()
def test_a_simple_feature_pyramid_is_convolutions_and_norms_without_an_activation():
    neck, (final,) = SimpleFeaturePyramid(8, 16, 6), maps_of(4, 6, count=1)
    assert (neck.strides, neck.channels) == ([4, 8, 16, 32, 64], [6] * 5)
    found = neck([final])
    assert [tuple(one.shape[1:]) for one in found] == [(6, 16, 24), (6, 8, 12), (6, 4, 6), (6, 2, 3), (6, 1, 2)]

    def normed(x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt()

    for level, x in ((1, doubled(final, neck.levels[1])), (2, final), (3, F.max_pool2d(final, 2))):
        narrow, _, wide, _ = neck.outputs[level]
        assert narrow.bias is None and wide.bias is None
        expected = normed(F.conv2d(normed(F.conv2d(x, narrow.weight)), wide.weight, padding=1))
        torch.testing.assert_close(found[level], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[4], found[3][..., ::2, ::2], rtol=0, atol=0)
    first, _, _, second = neck.levels[0]
    assert (first.out_channels, second.out_channels) == (4, 2)


def test_odd_maps_keep_their_last_row_and_column():
    assert [tuple(one.shape[2:]) for one in SimpleFeaturePyramid(8, 16, 6)(maps_of(3, 5, count=1))] == [
        (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)
    ]  # fmt: skip


def test_taps_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"got strides \[16, 16\]"):
        MultiScale([8] * 2, [16] * 2)
    with pytest.raises(UserError, match="four maps with one stride"):
        MultiScale([8] * 4, [4, 8, 16, 32])
    with pytest.raises(UserError, match="18 / 4 is no whole number"):
        MultiScale([8] * 4, [18] * 4)
    with pytest.raises(UserError, match="got stride 14"):
        SimpleFeaturePyramid(8, 14)
