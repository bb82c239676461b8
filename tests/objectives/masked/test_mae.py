"""Masked autoencoding: the masks, the loss worked by hand, and the patches that the encoder sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.objectives import MAE, Reconstruction
from ssmpretrain.objectives.masked.patches import patchify
from ssmpretrain.objectives.restore import load_objective


def make(**changes: Any) -> MAE:
    torch.manual_seed(0)
    return MAE(**{"encoder": "test_vim", "encoder_args": {"img_size": 64}, "decoder_embed_dim": 32, **changes})


def images(B: int = 2, H: int = 64, W: int = 64) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


def masks(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_by_hand_counts_hidden_patches_only() -> None:
    model = make(normalize_targets=False)
    picture = torch.zeros(1, 3, 64, 64)
    picture[0, :, :16, :16] = 2.0  # patch 0
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, [0, 5]] = True
    predicted = torch.full((1, 16, 768), 1.0)
    predicted[0, 7] = 100.0  # visible: must not count
    # patch 0: (1 - 2)^2 = 1; patch 5: (1 - 0)^2 = 1, then doubled error on patch 5 below
    assert model.loss(picture, Reconstruction(predicted, hidden)).item() == pytest.approx(1.0)
    predicted[0, 5] = 3.0
    assert model.loss(picture, Reconstruction(predicted, hidden)).item() == pytest.approx(5.0)


def test_normalised_targets_ignore_brightness_and_contrast_of_a_patch() -> None:
    model, picture = make(), images()
    result = model.reconstruct(picture, masks())
    loss = model.loss(picture, result)
    assert model.loss(3 * picture + 5, result).item() == pytest.approx(loss.item(), rel=1e-4)  # 1e-6 in the deviation
    perfect = patchify(picture, 16)
    variance, mean = torch.var_mean(perfect, dim=-1, keepdim=True)
    ideal = result._replace(predicted=(perfect - mean) / variance.sqrt())
    assert model.loss(picture, ideal).item() < 1e-9
    assert torch.allclose(model.predicted_images(picture, ideal), picture, atol=1e-4)


def test_hidden_pixels_cannot_reach_the_prediction() -> None:
    model, picture = make().eval(), images()
    before = model.reconstruct(picture, masks())
    hidden = before.hidden.reshape(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, torch.full_like(picture, 7.0), picture)
    after = model.reconstruct(changed, masks())
    assert torch.equal(before.hidden, after.hidden) and torch.equal(before.predicted, after.predicted)
    seen = torch.where(hidden, picture, picture + 1)
    assert not torch.equal(before.predicted, model.reconstruct(seen, masks()).predicted)


def test_encoder_gets_kept_tokens_in_order_and_the_class_token_in_their_middle() -> None:
    model, picture = make().eval(), images()
    sequences: list[Tensor] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda module, args: sequences.append(args[0]))
    keep = (~model.reconstruct(picture, masks()).hidden).nonzero()[:, 1].view(2, 4)
    tokens = model.encoder.embed(picture)
    (sequence,) = sequences
    expected = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    assert sequence.shape[1] == 5  # 4 of 16 patches and the class token
    assert torch.equal(sequence[:, [0, 1, 3, 4]], expected)
    assert torch.equal(sequence[0, 2], sequence[1, 2]) and not torch.equal(sequence[0, 1], sequence[1, 1])


def test_validation_masks_repeat_and_training_masks_do_not() -> None:
    model, picture = make(), images()
    assert torch.equal(model.reconstruct(picture, masks(3)).hidden, model.reconstruct(picture, masks(3)).hidden)
    assert not torch.equal(model.reconstruct(picture).hidden, model.reconstruct(picture).hidden)


@pytest.mark.parametrize(
    "changes", [{}, {"decoder": "vit", "decoder_num_heads": 4}, {"encoder_args": {"class_token": "none"}}]
)
def test_a_few_steps_lower_the_loss_and_reach_every_parameter(changes: dict[str, Any]) -> None:
    model, picture = make(**changes), images(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(picture, model.reconstruct(picture, masks()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_rectangles_and_other_sizes_work() -> None:
    model, picture = make(), images(H=32, W=96)
    result = model.reconstruct(picture)
    assert result.predicted.shape == (2, 12, 768)
    assert model.predicted_images(picture, result).shape == picture.shape
    assert model(picture).shape == (2, model.encoder.num_features)


def test_bfloat16_autocast_is_finite_with_float32_loss() -> None:
    model, picture = make(), images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(picture, model.reconstruct(picture, masks()))
    loss.backward()
    assert loss.dtype is torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.2}, r"mask_ratio is a fraction in \(0, 1\); got 1.2"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"decoder": "swin"}, "'vim' or 'vit'; got 'swin'"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"decoder_embed_dim": 30}, "multiple of 4"),
        ({"mask_unit": 24}, "mask_unit is a multiple of the encoder's patch, 16"),
        ({"encoder_args": {"stride": 8}}, "must not overlap"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_image_of_one_patch_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="two or more squares of 16 x 16"):
        make().reconstruct(images(H=16, W=16))


VIT = {"encoder": "test_vit", "encoder_args": {"img_size": 64}}


def test_vit_sees_its_class_token_and_the_kept_patches_with_their_positions() -> None:
    model, picture = make(**VIT).eval(), images()
    sequences: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda module, args: sequences.append(args[0]))
    keep = (~model.reconstruct(picture, masks()).hidden).nonzero()[:, 1].view(2, 4)
    patches = model.encoder.patch_embed(picture).reshape(2, 16, -1)
    tokens = patches + model.encoder.pos_embed[:, 1:]
    expected = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    assert torch.equal(sequences[0][:, 1:], expected) and sequences[0].shape[1] == 5


@pytest.mark.parametrize("encoder", ["test_vim", "test_vit", "deit_tiny_distilled_patch16_224", "test_vit3"])
def test_positions_are_fixed_unless_they_are_named(encoder: str) -> None:
    encoder_args = {"img_size": 64, "depth": 1} if encoder.startswith("deit") else {"img_size": 64}
    model = make(encoder=encoder, encoder_args=encoder_args)
    table = model.encoder.pos_embed
    patches = table[:, -16:] if encoder != "test_vim" else torch.cat([table[:, :8], table[:, 9:]], dim=1)
    assert not table.requires_grad
    assert torch.equal(patches, sincos_pos_embed(table.shape[-1], (4, 4)))
    loss = model.loss(images(), model.reconstruct(images(), masks()))
    assert loss.isfinite()


def test_named_positions_are_learned() -> None:
    assert make(encoder_args={"img_size": 64, "pos_embed": "learned"}).encoder.pos_embed.requires_grad


@pytest.mark.parametrize("encoder", ["test_mambaout", "test_convnext", "swin_tiny_patch4_window7_224", "resnet18"])
def test_encoder_that_needs_the_whole_map_is_refused_with_those_that_do_not(encoder: str) -> None:
    with pytest.raises(
        ValueError, match=r"visible patches alone; .* cannot\. Choose Vim .*VMamba .*ViT and DeiT.*SimMIM"
    ):
        make(encoder=encoder, encoder_args={})


def test_units_of_several_patches_are_hidden_together() -> None:
    model = make(mask_unit=32, mask_ratio=0.5)
    hidden = model.reconstruct(images(), masks()).hidden.view(2, 2, 2, 2, 2).transpose(2, 3).flatten(3)
    assert torch.equal(hidden.all(dim=3), hidden.any(dim=3)) and hidden.all(dim=3).sum() == 4


def test_the_decoder_gets_the_class_token_behind_the_patches() -> None:
    model, keep = make().eval(), torch.tensor([[1, 4, 6, 15]])
    features, class_token = torch.randn(1, 4, 32), torch.randn(1, 32)
    sequences: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, args: sequences.append(args[0]))
    predicted = model._decode(features, class_token, keep, (4, 4))
    tokens = model.mask_token.repeat(1, 16, 1)
    tokens[:, keep[0]] = model.decoder_embed(features)
    tokens = torch.cat([tokens + sincos_pos_embed(32, (4, 4)), model.decoder_embed(class_token).unsqueeze(1)], dim=1)
    torch.testing.assert_close(sequences[0], tokens)
    torch.testing.assert_close(predicted, model.decoder_pred(model.decoder(tokens)[:, :-1]))


def test_a_decoder_that_began_with_the_class_token_in_the_middle_goes_on_so(tmp_path: Path) -> None:
    old = make(decoder_class_token="middle").eval()
    expected = old.reconstruct(images(), masks()).predicted
    settings = {name: value for name, value in old.hparams.items() if name != "decoder_class_token"}
    content = {"state_dict": old.state_dict(), "hyper_parameters": settings, "objective": "MAE"}
    torch.save(content, tmp_path / "last.ckpt")
    restored = load_objective(tmp_path / "last.ckpt").model
    assert torch.equal(restored.reconstruct(images(), masks()).predicted, expected)
    resumed = make().eval()
    assert not torch.allclose(resumed.reconstruct(images(), masks()).predicted, expected)
    resumed.on_load_checkpoint(content)
    resumed.load_state_dict(content["state_dict"])
    assert torch.equal(resumed.reconstruct(images(), masks()).predicted, expected)
    assert resumed.hparams["decoder_class_token"] == "middle"  # and so in the checkpoints that follow


def test_the_decoder_of_a_vim_is_made_like_its_encoder() -> None:
    args = {"img_size": 64, "scan_norm": True, "backward_dt_bias_init": "zero", "depth": 24}
    decoder = make(encoder_args=args).decoder
    assert decoder.layers[0].mixer.layernorm.weight.shape == (64,)
    assert not any(layer.mixer.dt_proj_b.bias.any() for layer in decoder.layers)
    largest = max(float(layer.mixer.out_proj.weight.detach().abs().max()) for layer in decoder.layers)
    assert largest == pytest.approx(64**-0.5 / 24**0.5, rel=0.01)
    assert make().decoder.layers[0].mixer.layernorm is None


@pytest.mark.parametrize("encoder", ["test_vim", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_fresh_weights_are_drawn_as_published(encoder: str) -> None:
    encoder_args = {"img_size": 64, "depth": 1} if encoder.startswith("deit") else {"img_size": 64}
    model = make(encoder=encoder, encoder_args=encoder_args, decoder="vit")
    parts = list(model.decoder.modules()) + (list(model.encoder.modules()) if encoder != "test_vim" else [])
    linear = [part for part in parts if isinstance(part, torch.nn.Linear)]
    projection = model.encoder.patch_embed.proj.weight.flatten(1)
    for weight in [projection, *(layer.weight for layer in linear)]:
        assert float(weight.detach().abs().max()) == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.02)
    assert not any(layer.bias.any() for layer in linear if layer.bias is not None)
    assert {part.eps for part in parts if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert float(model.encoder.cls_token.detach().std()) == pytest.approx(0.02, rel=0.4)
    assert model.encoder.cls_token.requires_grad and model.encoder.patch_embed.proj.bias.any()


def test_weights_that_the_encoder_begins_with_are_kept(tmp_path: Path) -> None:
    encoder = create_encoder("test_vit", num_classes=0, img_size=64)
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    for changes in (
        {"init_from": str(tmp_path / "weights.pth"), "encoder_args": {"img_size": 64}},
        {"encoder_args": {"img_size": 64, "checkpoint_path": str(tmp_path / "weights.pth")}},
    ):
        model = make(encoder="test_vit", **changes)
        assert torch.equal(model.encoder.patch_embed.proj.weight, encoder.patch_embed.proj.weight)
