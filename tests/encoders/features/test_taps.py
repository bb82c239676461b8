"""Maps after some blocks or stages of every kind of encoder, of images of any size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ssmpretrain import create_encoder
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps

_SWIN = {"embed_dim": 12, "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 2), "img_size": 224}
# Each encoder, its arguments, and the number of pixels whose multiples it reads; 1 if it reads every size.
ENCODERS = [
    ("test_vim", {}, 16),
    ("test_vim", {"patch_size": 8}, 8),
    ("test_vmamba", {}, 1),
    ("test_vmamba", {"stem": "patch", "downsample": "merge"}, 4),
    ("test_vmamba", {"downsample": "conv2"}, 32),
    ("test_vmamba2", {}, 1),
    ("test_arm", {}, 16),
    ("test_vit", {}, 16),
    ("swin_tiny_patch4_window7_224", _SWIN, 32),
    ("test_convnext", {}, 32),
    ("test_mambaout", {}, 32),
    ("test_resnet", {}, 32),  # of no registered family
]
_NAMES = [f"{name}-{'-'.join(map(str, args)) or 'default'}" for name, args, _ in ENCODERS]


def built(name, **args):
    torch.manual_seed(0)
    return create_encoder(name, num_classes=5, **args).eval()


def image(height=37, width=53, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "args", "multiple"), ENCODERS, ids=_NAMES)
@torch.no_grad()
def test_maps_of_any_size_are_those_of_the_padded_image(name, args, multiple):
    tapped = TappedEncoder(built(name, **args), Taps(norm="none", class_token=None if name != "test_vim" else True))
    for height, width in ((37, 53), (96, 64)):
        maps = tapped(image(height, width))
        padded = F.pad(image(height, width), (0, -width % multiple, 0, -height % multiple))
        expected = tapped.encoder.forward_intermediates(padded, indices=tapped.indices, intermediates_only=True)
        for one, whole, channels, stride in zip(maps, expected, tapped.channels, tapped.strides, strict=True):
            assert one.shape == (1, channels, -(-height // stride), -(-width // stride))
            torch.testing.assert_close(one, whole[..., : one.shape[2], : one.shape[3]], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "args", "multiple"), ENCODERS, ids=_NAMES)
def test_exactly_the_trainable_parameters_get_gradients(name, args, multiple):
    tapped = TappedEncoder(built(name, **args), Taps(indices=[0, 1]))
    sum(one.square().mean() for one in tapped(image())).backward()
    without = {key for key, parameter in tapped.named_parameters() if parameter.grad is None}
    assert without == {key for key, parameter in tapped.named_parameters() if not parameter.requires_grad}
    assert any("head" in key or "fc" in key for key in without)


def test_default_taps_are_four_even_blocks_or_all_stages_from_stride_4_on():
    assert TappedEncoder(built("test_vim", depth=24)).indices == [5, 11, 17, 23]
    assert TappedEncoder(built("test_vim", depth=24, bidirectional="layer")).indices == [2, 5, 8, 11]
    assert TappedEncoder(built("test_vim", depth=2)).indices == [0, 1]
    assert TappedEncoder(built("test_vmamba")).strides == [4, 8, 16, 32]
    assert TappedEncoder(built("test_resnet")).strides == [4, 8, 16, 32]
    assert TappedEncoder(built("test_vim"), Taps(indices=[-1, 1])).indices == [1, 3]


@torch.no_grad()
def test_a_class_token_is_left_out_before_the_blocks():
    with_token, without = built("test_vim"), built("test_vim", class_token="none", global_pool="avg")
    state = with_token.state_dict()
    middle = state["pos_embed"].shape[1] // 2
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :middle], state["pos_embed"][:, middle + 1 :]], dim=1)
    del state["cls_token"]
    without.load_state_dict(state)
    maps = TappedEncoder(with_token)(image())
    expected = TappedEncoder(without)(image())
    kept = TappedEncoder(built("test_vim"), Taps(class_token=True))(image())
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    assert not torch.allclose(maps[-1], kept[-1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixer_taps_are_the_outputs_of_the_mixers(checkpointing):
    encoder, outputs = built("test_vim").train(), {}
    tapped = TappedEncoder(encoder, Taps(indices=[1, 3], read="mixer", class_token=False))
    plain = [one.detach() for one in tapped(image(32, 48))]
    for number in tapped.indices:
        hook = lambda _, __, output, number=number: outputs.update({number: output})  # noqa: E731
        encoder.layers[number].mixer.register_forward_hook(hook)
    tapped.set_grad_checkpointing(checkpointing)
    maps = tapped(image(32, 48))
    for number, one, before in zip(tapped.indices, maps, plain, strict=True):
        tokens = outputs[number].transpose(1, 2).reshape(1, -1, 2, 3)
        torch.testing.assert_close(one, tokens, rtol=0, atol=0)
        torch.testing.assert_close(one, before)
    sum(one.square().mean() for one in maps).backward()
    assert encoder.layers[0].mixer.in_proj.weight.grad.any()


@torch.no_grad()
def test_overlapping_patches_give_one_position_per_stride():
    tapped = TappedEncoder(built("test_vim", patch_size=16, stride=8))
    assert [tuple(one.shape[2:]) for one in tapped(image(40, 56))] == [(5, 7)] * 4


@torch.no_grad()
def test_fresh_norms_have_mean_0_and_deviation_1_over_the_channels_and_final_norms_are_the_encoders():
    tapped = TappedEncoder(built("test_vmamba"))
    assert [norm.eps for norm in tapped.norms.values()] == [1e-5] * 4
    for one in tapped(100 * image()):
        assert one.mean(dim=1).abs().max() < 1e-5
        assert (one.var(dim=1, unbiased=False) - 1).abs().max() < 1e-2
    final = TappedEncoder(built("test_vmamba"), Taps(norm="final"))
    expected = final.encoder.forward_features(image()).permute(0, 3, 1, 2)
    torch.testing.assert_close(final(image())[-1], expected, rtol=0, atol=0)
    assert final.encoder.classifier.norm.weight.requires_grad


def test_windows_of_swin_exchange_in_a_map_that_is_larger_than_a_window():
    tapped = TappedEncoder(built("swin_tiny_patch4_window7_224", **_SWIN), Taps(indices=[3], norm="none"))
    pixels = image(448, 448).requires_grad_()
    tapped(pixels)[0][0, :, 5, 5].sum().backward()  # a position of the first window, near its neighbours
    assert pixels.grad[..., 7 * 32 + 64 :].any(), "a pixel of the second window reaches it through shifted windows"


def test_a_neck_of_norms_can_share_the_encoder_with_its_owner():
    encoder = built("test_vmamba")
    tapped = TappedEncoder(encoder, registers_encoder=False)
    assert tapped.encoder is encoder
    assert {key.split(".")[0] for key in tapped.state_dict()} == {"norms"}


def test_an_encoder_with_a_fixed_size_is_refused():
    with pytest.raises(UserError, match=r"taps of Beit: .* fails with 64 x 96 pixels \(Input height"):
        TappedEncoder(timm.create_model("beit_base_patch16_224", embed_dim=12, depth=1, num_heads=1))
    dynamic = timm.create_model("eva02_tiny_patch14_224", embed_dim=12, depth=1, num_heads=1, dynamic_img_size=True)
    assert TappedEncoder(dynamic)(image())[0].shape == (1, 12, 3, 4)


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        ("test_vim", Taps(indices=[4]), "blocks, 0 to 3"),
        ("test_vim", Taps(indices=[1, -3]), "Name each once"),
        ("test_vmamba", Taps(read="mixer"), "read is stream"),
        ("test_vmamba", Taps(norm="layer"), "norm is one of"),
        ("test_vmamba", Taps(norm="final", indices=[0, 1]), "norm of the last of 4 stages"),
        ("test_vmamba", Taps(class_token=False), "class_token is True"),
        ("test_vmamba", Taps(class_token=True), "this encoder has none"),
        ("test_vit", Taps(class_token=False), "need the class tokens"),
    ],
)
def test_a_choice_that_the_encoder_does_not_have_is_refused(name, taps, message):
    with pytest.raises(UserError, match=message):
        TappedEncoder(built(name), taps)


def test_a_module_without_timms_interface_is_refused():
    with pytest.raises(UserError, match="forward_intermediates"):
        TappedEncoder(nn.Linear(3, 3))
