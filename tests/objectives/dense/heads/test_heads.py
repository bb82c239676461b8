"""Heads of segmentation: published sizes, values by hand, wrong settings."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmpretrain.objectives.dense.heads import FCN, Linear, Segmenter, UPerNet
from ssmpretrain.objectives.dense.heads.upernet import PyramidPooling
from ssmpretrain.training.optim.adamw import parameter_groups


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("widths", "channels", "expected", "auxiliary"),
    [
        ((96, 192, 384, 768), 512, 31.5, 0.92),
        ((128, 256, 512, 1024), 512, 33.3, 1.22),
        ((192, 192, 192, 192), 192, 4.27, 0.48),
        ((384, 384, 384, 384), 384, 17.0, 0.92),
    ],
)
def test_parameters_are_those_of_the_published_heads(
    widths: Sequence[int], channels: int, expected: float, auxiliary: float
) -> None:
    with torch.device("meta"):
        assert parameters(UPerNet(channels).build(widths, 150)) / 1e6 == pytest.approx(expected, rel=2e-3)
        assert parameters(FCN().build(widths, 150)) / 1e6 == pytest.approx(auxiliary, abs=0.005)


def test_segmenter_has_two_blocks_three_matrices_and_a_token_per_class() -> None:
    D, K = 192, 150
    with torch.device("meta"):
        head = Segmenter().build([D], K)
    block = 12 * D**2 + 13 * D  # qkv, projection, MLP of 4 D, their biases, two norms
    assert parameters(head) == 2 * block + (D**2 + D) + 2 * D**2 + K * D + 2 * D + 2 * K


def sum_of_inputs(head: nn.Module) -> nn.Module:
    """Let every convolution add up its channels at each position, and no norm or activation change anything."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            module.weight.data[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    return head.eval()


def test_upernet_adds_up_the_maps_from_coarse_to_fine() -> None:
    head = sum_of_inputs(UPerNet(channels=1).build([1, 1, 1, 1], 2))
    a, b, c, d = 1.0, 10.0, 100.0, 1000.0
    maps = [torch.full((1, 1, 16 >> level, 8 >> level), value) for level, value in enumerate((a, b, c, d))]
    # The coarsest level is d and four means of it; each finer one adds its own map; the fusion adds up all levels.
    expected = (a + b + c + 5 * d) + (b + c + 5 * d) + (c + 5 * d) + 5 * d
    assert torch.allclose(head(maps), torch.full((1, 2, 16, 8), expected))


def test_pyramid_pooling_adds_the_means_of_cells_without_aligned_corners() -> None:
    pooling = sum_of_inputs(PyramidPooling(1, 1, [1, 2]))
    features = torch.tensor([[[[0.0, 4.0, 8.0, 12.0]]]]).expand(1, 1, 4, 4)
    means = torch.tensor([2.0, 4.0, 8.0, 10.0])  # 2 and 10 at the centres of two cells of two positions
    assert torch.allclose(pooling(features), features + 6.0 + means)


def test_segmenter_compares_normalised_patches_with_normalised_class_tokens() -> None:
    torch.manual_seed(0)
    head = Segmenter(depth=1).build([8], 3).eval()
    features = torch.randn(2, 8, 4, 5)
    patches = torch.stack([head.project(features[:, :, y, x]) for y in range(4) for x in range(5)], dim=1)
    tokens = head.norm(head.blocks(torch.cat([patches, head.class_tokens.expand(2, 3, 8)], dim=1)))
    patches, classes = tokens[:, :20] @ head.patch_matrix, tokens[:, 20:] @ head.class_matrix
    cosine = F.cosine_similarity(patches.unsqueeze(2), classes.unsqueeze(1), dim=3)  # (B, L, K)
    expected = (cosine - cosine.mean(2, keepdim=True)) / (cosine.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    logits = head([features])
    assert logits.shape == (2, 3, 4, 5)
    assert torch.allclose(logits[:, :, 1, 2], expected[:, 7], atol=1e-5)


def test_tokens_of_segmenter_have_no_weight_decay() -> None:
    head = Segmenter(depth=1).build([8], 3)
    (spared,) = (group["param_names"] for group in parameter_groups(head, 0.05) if not group["weight_decay"])
    assert "class_tokens" in spared and "patch_matrix" not in spared


def test_the_linear_head_is_linear_in_one_map() -> None:
    head = Linear().build([4], 3)
    features = torch.randn(1, 4, 2, 2)
    expected = head.classifier.weight[:, :, 0, 0] @ features[0, :, 1, 0] + head.classifier.bias
    assert torch.allclose(head([features])[0, :, 1, 0], expected, atol=1e-6)


def test_the_mean_over_the_whole_map_needs_two_images_in_training() -> None:
    head, maps = UPerNet(channels=4).build([4, 4], 2), [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    with pytest.raises(ValueError, match=r"needs 2 values or more .* got 1 image .* Raise data.batch_size"):
        head(maps)
    assert head.eval()(maps).shape == (1, 2, 8, 8)
    head = UPerNet(channels=4, pool_sizes=(2, 3)).build([4, 4], 2)
    assert head(maps).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="got 1 image whose map has 1 position"):
        head([maps[0], maps[1][..., :1, :1]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UPerNet(channels=0), "UPerNet: channels is at least 1; got 0"),
        (lambda: UPerNet(pool_sizes=()), r"UPerNet: pool_sizes are one or more, each at least 1; got \[\]"),
        (lambda: UPerNet(dropout=1.0), r"UPerNet: dropout is a fraction in \[0, 1\); got 1.0"),
        (lambda: FCN(weight=0.0), "FCN: weight is finite and above 0; got 0.0. Set model.auxiliary to null"),
        (lambda: FCN(map=4).build([8] * 4, 2), "FCN: map is one of 4 maps, numbered from 0; got 4"),
        (
            lambda: FCN().build([8], 2),
            "got map 2, as of the four maps of UPerNet. Set model.auxiliary to null, or model",
        ),
        (lambda: Segmenter(depth=0), "Segmenter: depth is at least 1; got 0"),
        (lambda: Segmenter(num_heads=0), "Segmenter: num_heads is at least 1; got 0"),
        (lambda: Segmenter(num_heads=3).build([64], 2), "Segmenter: num_heads divides the 64 channels .*; got 3"),
        (lambda: Segmenter(mlp_ratio=0.0), "Segmenter: mlp_ratio is above 0"),
    ],
)
def test_wrong_settings_of_heads_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
