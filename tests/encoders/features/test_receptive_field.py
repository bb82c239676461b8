"""The effective receptive field against networks whose field is known by construction."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.features.receptive_field import ReceptiveField, Square, receptive_field, smallest_square


class Maps(nn.Module):
    """Layers whose output is the last map."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward_intermediates(self, images: Tensor, **options: Any) -> list[Tensor]:
        return [self.layers(images)]


def images(B: int, H: int, W: int) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(0))


def with_weights(conv: nn.Conv2d, weight: float) -> nn.Conv2d:
    nn.init.constant_(conv.weight, weight)
    nn.init.constant_(conv.bias, 100.0)  # every feature is positive
    return conv


def test_one_convolution_sees_its_kernel_and_nothing_else() -> None:
    encoder = Maps(with_weights(nn.Conv2d(3, 5, 3, padding=1), 0.5)).eval()
    field = receptive_field(encoder, images(4, 8, 10))
    expected = torch.zeros(8, 10, dtype=torch.float64)
    expected[3:6, 4:7] = 5 * 3 * 0.5  # features x channels x weight: the mean over images, not their sum
    assert torch.allclose(field.contributions, expected) and field.centre == (4.5, 5.5)
    assert smallest_square(field, 1.0) == Square(3, 4, 3, 3)
    assert smallest_square(field, 0.1) == Square(4, 5, 1, 1)


def test_a_patch_embedding_sees_one_patch() -> None:
    encoder = Maps(with_weights(nn.Conv2d(3, 2, 4, stride=4), 1.0)).eval()
    field = receptive_field(encoder, images(1, 16, 12))  # 4 x 3 patches; the centre is patch (2, 1)
    seen = field.contributions > 0
    assert seen.sum() == 16 and seen[8:12, 4:8].all() and field.centre == (10.0, 6.0)
    assert [smallest_square(field, share) for share in (0.2, 0.9)] == [Square(9, 5, 2, 2), Square(8, 4, 4, 4)]


def test_only_what_raises_a_feature_counts() -> None:
    positive = Maps(with_weights(nn.Conv2d(3, 2, 1), 2.0)).eval()
    assert receptive_field(positive, images(1, 4, 4)).contributions.sum() == 12  # 2 features x 3 channels x weight 2
    with pytest.raises(ValueError, match="all zero"):
        receptive_field(Maps(with_weights(nn.Conv2d(3, 2, 1), -2.0)).eval(), images(1, 4, 4))
    silent = Maps(with_weights(nn.Conv2d(3, 2, 1), 2.0), nn.Threshold(1e9, -1.0)).eval()  # features below 0 say nothing
    with pytest.raises(ValueError, match="all zero"):
        receptive_field(silent, images(1, 4, 4))


def test_result_does_not_depend_on_the_batch_size_and_leaves_no_gradient() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("test_vim", num_classes=0, img_size=64).eval()
    pictures = images(3, 64, 64)
    whole, single = receptive_field(encoder, pictures, 8), receptive_field(encoder, pictures, 1)
    assert torch.allclose(whole.contributions, single.contributions, rtol=1e-4, atol=1e-7)
    assert not pictures.requires_grad and all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "test_vim",
        "test_vmamba",
        "test_vmamba2",
        "test_mambaout",
        "test_vit",
        "test_convnext",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_every_family_has_a_field_where_its_central_position_lies(name: str) -> None:
    small = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)} if name.startswith("swin") else {}
    torch.manual_seed(0)
    encoder: Any = create_encoder(name, num_classes=0, **small).eval()
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=(64, 96))
    field = receptive_field(encoder, images(1, 64, 96))
    stride = encoder.feature_info[-1]["reduction"]
    y, x = (side // stride // 2 * stride for side in (64, 96))
    own = field.contributions[y : y + stride, x : x + stride]
    assert field.centre == (y + stride / 2, x + stride / 2)
    assert own.mean() > field.contributions.mean() > 0  # a LayerNorm's features sum to zero; this must not


def test_a_convolutional_encoder_sees_nothing_beyond_its_layers() -> None:
    torch.manual_seed(0)
    stem = create_encoder("test_convnext", num_classes=0).stem  # a convolution 4 x 4 of stride 4 and a norm
    field = receptive_field(Maps(stem).eval(), images(2, 40, 40))
    outside = field.contributions.clone()
    outside[20:24, 20:24] = 0
    assert not outside.any() and field.contributions[20:24, 20:24].all()


def test_a_square_grows_until_it_holds_its_share() -> None:
    contributions = torch.zeros(9, 9, dtype=torch.float64)
    contributions[2:7, 2:7] = 1.0
    contributions[4, 4] = 3.0  # squares of side 1, 3 and 5 hold 3, 11 and 27 of 27
    field = ReceptiveField(contributions, (4.5, 4.5))
    sides = {share: smallest_square(field, share).side for share in (0.1, 0.12, 0.4, 0.41, 1.0)}
    assert sides == {0.1: 1, 0.12: 3, 0.4: 3, 0.41: 5, 1.0: 5}


def test_squares_end_where_the_image_ends() -> None:
    contributions = torch.zeros(8, 8, dtype=torch.float64)
    contributions[0, 0] = 1.0
    assert smallest_square(ReceptiveField(contributions, (6.0, 6.0)), 0.9) == Square(0, 0, 8, 8)
    contributions[5, 5] = 1.0
    square = smallest_square(ReceptiveField(contributions, (6.0, 6.0)), 0.5)
    assert square == Square(5, 5, 2, 2) and square.side == 2
    cut = torch.zeros(8, 8, dtype=torch.float64)
    cut[3, 6] = 1.0
    assert smallest_square(ReceptiveField(cut, (6.0, 6.0)), 1.0) == Square(3, 3, 5, 5)


def test_an_encoder_in_training_or_without_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.eval\(\)"):
        receptive_field(Maps(nn.Conv2d(3, 2, 1)), images(1, 4, 4))
    with pytest.raises(ValueError, match="Conv2d lacks it"):
        receptive_field(nn.Conv2d(3, 2, 1).eval(), images(1, 4, 4))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        receptive_field(Maps(with_weights(nn.Conv2d(3, 2, 1), weight)).eval(), images(1, 4, 4).abs())
