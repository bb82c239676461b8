"""SimMIM: the loss worked by hand, the places of the mask token, and the pixels that the encoder sees, by family."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

import ssmpretrain
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.encoders.features.maps import last_map
from ssmpretrain.objectives import Reconstruction, SimMIM
from ssmpretrain.objectives.masked.patches import on_pixels, patchify, unpatchify
from ssmpretrain.objectives.restore import load_objective
from ssmpretrain.training.optim.adamw import parameter_groups

TINY_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("test_vim", {"img_size": 64}),
    "vmamba": ("test_vmamba", {}),
    "vmamba2": ("test_vmamba2", {}),
    "vmamba_v0": ("test_vmamba", {"stem": "patch", "downsample": "merge"}),
    "mambaout": ("test_mambaout", {}),
    "convnext": ("test_convnext", {}),
    "convnext_overlap": ("test_convnext", {"stem_type": "overlap_tiered"}),
    "vit": ("test_vit", {"img_size": 64, "depth": 2}),
    "vit_pooled": ("test_vit3", {"img_size": 64, "depth": 2, "dynamic_img_size": True}),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, **TINY_SWIN}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, **TINY_SWIN}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str = "vmamba", **changes: Any) -> SimMIM:
    torch.manual_seed(0)
    encoder, encoder_args = FAMILIES[family]
    return SimMIM(**{"encoder": encoder, "encoder_args": encoder_args, **changes})


def images(B: int = 2, H: int = 64, W: int = 64) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


def masks(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_pixels(model: SimMIM, hidden: Tensor, H: int = 64, W: int = 64) -> Tensor:
    return on_pixels(hidden, (H // model.patch_size, W // model.patch_size), model.patch_size)


def test_loss_by_hand_is_the_absolute_error_of_hidden_pixels_only() -> None:
    model = make()
    picture = torch.zeros(1, 3, 64, 64)
    picture[0, :, :32, :32] = 2.0  # position 0
    hidden = torch.tensor([[True, False, True, False]])
    predicted = torch.full((1, 4, 3072), -1.0)
    predicted[0, 3] = 100.0  # visible: must not count
    # position 0: |-1 - 2| = 3; position 2: |-1 - 0| = 1
    assert model.loss(picture, Reconstruction(predicted, hidden)).item() == pytest.approx(2.0)


def test_normalised_targets_are_standardised_per_position() -> None:
    model, picture = make(normalize_targets=True), images()
    patches = patchify(picture, 32)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    ideal = Reconstruction((patches - mean) / variance.sqrt(), torch.ones(2, 4, dtype=torch.bool))
    assert model.loss(picture, ideal).item() < 1e-5
    assert torch.allclose(model.predicted_images(picture, ideal), picture, atol=1e-4)


def test_prediction_is_the_papers_one_by_one_convolution_and_pixel_shuffle() -> None:
    model, picture = make().eval(), images()
    maps: list[Tensor] = []
    model.prediction_head.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    result = model.reconstruct(picture, masks())
    features = maps[0].transpose(1, 2).unflatten(2, (2, 2))  # (B, D, h, w)
    # `patchify` keeps the channels last, a pixel shuffle wants them first.
    weight = model.prediction_head.weight.unflatten(0, (32, 32, 3)).permute(2, 0, 1, 3).flatten(0, 2)
    bias = model.prediction_head.bias.view(32, 32, 3).permute(2, 0, 1).flatten()
    shuffled = F.pixel_shuffle(F.conv2d(features, weight[:, :, None, None], bias), 32)
    assert torch.allclose(unpatchify(result.predicted, 32, (64, 64)), shuffled, atol=1e-5)


@every_family
def test_hidden_pixels_cannot_reach_the_prediction(family: str) -> None:
    model, picture = make(family).eval(), images()
    with torch.no_grad():
        before = model.reconstruct(picture, masks())
        hidden = hidden_pixels(model, before.hidden)
        changed = torch.where(hidden, torch.nan, picture)
        after = model.reconstruct(changed, masks())
        assert torch.equal(before.hidden, after.hidden) and torch.equal(before.predicted, after.predicted)
        seen = torch.where(hidden, picture, picture + 1)
        assert not torch.equal(before.predicted, model.reconstruct(seen, masks()).predicted)


def test_first_block_reads_the_token_where_hidden_and_the_stem_of_what_is_seen_elsewhere() -> None:
    model, picture = make().eval(), images()
    maps: list[Tensor] = []
    model.encoder.layers[0].blocks[0].register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    hidden = model.reconstruct(picture, masks()).hidden
    own = model.encoder.embed(torch.where(hidden_pixels(model, hidden), 0, picture))  # (B, 16, 16, C)
    where = hidden_pixels(model, hidden)[:, 0, ::4, ::4]
    assert 0 < where.sum() < where.numel()
    assert torch.equal(maps[0][where], model.mask_token[0, 0].expand(int(where.sum()), -1))
    assert torch.equal(maps[0][~where], own[~where])


def test_validation_masks_repeat_and_training_masks_do_not() -> None:
    model, picture = make("vim", mask_unit=None), images()
    assert torch.equal(model.reconstruct(picture, masks(3)).hidden, model.reconstruct(picture, masks(3)).hidden)
    assert not torch.equal(model.reconstruct(picture).hidden, model.reconstruct(picture).hidden)


@every_family
def test_a_few_steps_lower_the_loss_and_reach_every_parameter(family: str) -> None:
    model, picture = make(family), images(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(picture, model.reconstruct(picture, masks()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("family", ["mambaout", "convnext", "vit_pooled"])
def test_only_what_pools_the_last_map_is_frozen(family: str) -> None:
    frozen = [name for name, p in make(family).encoder.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith(("head.", "attn_pool.", "fc_norm.")) for name in frozen)


@pytest.mark.parametrize("family", ["vim", "vmamba", "mambaout", "convnext", "swin"])
def test_rectangles_and_other_sizes_work(family: str) -> None:
    encoder_args = FAMILIES[family][1]
    fixed = {"img_size": [64, 96]} if "img_size" in encoder_args else {}
    model, picture = make(family, encoder_args={**encoder_args, **fixed}), images(H=64, W=96)
    result = model.reconstruct(picture)
    p = model.patch_size
    assert result.predicted.shape == (2, 64 // p * 96 // p, 3 * p * p)
    assert model.predicted_images(picture, result).shape == picture.shape
    assert model(picture).shape == (2, model.encoder.num_features)


@every_family
def test_bfloat16_autocast_is_finite_with_float32_loss(family: str) -> None:
    model, picture = make(family), images()
    with torch.autocast("cpu", torch.bfloat16):
        result = model.reconstruct(picture, masks())
        loss = model.loss(picture, result)
    loss.backward()
    assert result.predicted.dtype is torch.float32 and loss.dtype is torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.mask_token.grad is not None and model.mask_token.grad.any()


@pytest.mark.parametrize("family", ["vmamba", "mambaout", "vit"])
def test_gradients_are_the_same_with_recomputed_blocks(family: str) -> None:
    picture, gradients = images(), []
    for enable in (False, True):
        model = make(family)
        model.encoder.set_grad_checkpointing(enable)
        model.loss(picture, model.reconstruct(picture, masks())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_mask_token_is_not_decayed() -> None:
    decayed, exempt = parameter_groups(make(), 0.05)
    assert "mask_token" in exempt["param_names"] and "prediction_head.weight" in decayed["param_names"]


def test_units_of_several_positions_are_hidden_together() -> None:
    hidden = make("vim", mask_ratio=0.5).reconstruct(images(), masks()).hidden
    units = hidden.view(2, 2, 2, 2, 2).transpose(2, 3).flatten(3)
    assert torch.equal(units.all(dim=3), units.any(dim=3)) and units.all(dim=3).sum() == 4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vmamba", {"mask_ratio": 1.2}, r"mask_ratio is a fraction in \(0, 1\); got 1.2"),
        ("vmamba", {"mask_ratio": 0.0}, "mask_ratio"),
        ("vmamba", {"mask_unit": 48}, "mask_unit is a multiple of the encoder's patch, 32 pixels; got 48"),
        ("vmamba", {"mask_unit": 16}, "mask_unit .* got 16. Set it to 32"),
        ("vim", {"encoder_args": {"stride": 8}}, "SimMIM: test_vim: patches must not overlap.*stride 8. Set"),
    ],
)
def test_bad_arguments_are_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(family, **changes)


@pytest.mark.parametrize("encoder", ["test_resnet", "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224"])
def test_encoder_without_a_known_patch_embedding_is_refused_with_those_that_have_one(encoder: str) -> None:
    with pytest.raises(ValueError, match=rf"{encoder}' \(.*none that is known\. Choose Vim .*MambaOut.*Swin .*DeiT"):
        SimMIM(encoder=encoder)


def test_an_image_of_one_unit_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="two or more squares of 32 x 32"):
        make().reconstruct(images(H=32, W=32))


def fit(model: SimMIM, images: ImageShards, tmp_path: Path) -> Path:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=images)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("family", "image_size"), [("swin", 192), ("swin", 64), ("swinv2", 64), ("mambaout", 64), ("vmamba", 64)]
)
def test_checkpoint_brings_back_the_objective_and_its_encoder(
    family: str, image_size: int, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    encoder, encoder_args = FAMILIES[family]
    flexible = {name: value for name, value in encoder_args.items() if name != "img_size"}
    model = SimMIM(encoder=encoder, encoder_args=flexible)
    shard = str(write_shard(tmp_path / "train.tar"))
    data = ImageShards(train=shard, val=shard, image_size=image_size, batch_size=2, num_workers=0)
    path = fit(model, data, tmp_path)
    run = load_objective(path)
    restored, content = run.model, run.content
    picture = images(2, image_size, image_size)
    with torch.no_grad():
        expected = model.eval().reconstruct(picture, masks())
        result = restored.reconstruct(picture, masks())
        assert type(restored) is SimMIM and content["objective"] == "SimMIM"
        assert torch.equal(result.predicted, expected.predicted)
        assert torch.equal(last_map(ssmpretrain.load_encoder(path).eval(), picture), last_map(model.encoder, picture))


def test_encoder_copied_after_a_step_is_free_of_masks() -> None:
    model, picture = make().eval(), images()
    before = last_map(model.encoder, picture)
    model.reconstruct(picture, masks())
    assert torch.equal(last_map(copy.deepcopy(model.encoder), picture), before)
