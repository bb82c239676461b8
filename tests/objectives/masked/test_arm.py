"""Autoregression over clusters: their order, the dependence of predictions, the loss worked by hand, and a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

import ssmpretrain
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.objectives import ARM, Reconstruction
from ssmpretrain.objectives.masked.arm import DecoderBlock, from_clusters, layers_read, to_clusters
from ssmpretrain.objectives.restore import load_objective


def make(**changes: Any) -> ARM:
    """4 x 4 patches in 2 x 2 clusters of 2 x 2, unless the images are others."""
    torch.manual_seed(0)
    settings = {"encoder_args": {"img_size": 64}, "cluster_size": 2, "decoder_embed_dim": 32, "decoder_depth": 3}
    return ARM(**{"encoder": "test_arm", "decoder_num_heads": 4, **settings, **changes})


def images(B: int = 2, H: int = 64, W: int = 64) -> Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


# The order


def test_clusters_and_their_patches_are_read_row_by_row() -> None:
    raster = torch.arange(24).view(1, 24, 1)  # 4 x 6 patches
    clusters = to_clusters(raster, (4, 6), 2)
    # fmt: off
    assert clusters.flatten().tolist() == [
        0, 1, 6, 7,  2, 3, 8, 9,  4, 5, 10, 11,
        12, 13, 18, 19,  14, 15, 20, 21,  16, 17, 22, 23,
    ]
    # fmt: on
    assert torch.equal(from_clusters(clusters, (4, 6), 2), raster)


def test_encoder_scans_all_clusters_but_the_last_in_that_order() -> None:
    model, picture = make().eval(), images()
    sequences: list[Tensor] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda module, args: sequences.append(args[0]))
    model.reconstruct(picture)
    seen = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13]
    assert torch.equal(sequences[0], model.encoder.embed(picture)[:, seen])


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [(12, 4, [5, 7, 9, 11]), (24, 4, [11, 15, 19, 23]), (4, 3, [1, 2, 3]), (4, 2, [1, 3]), (12, 1, [11])],
)
def test_decoder_reads_layers_from_the_middle_to_the_last(num_layers: int, count: int, expected: list[int]) -> None:
    assert layers_read(num_layers, count) == expected  # the first two: 6, 8, 10, 12 and 12, 16, 20, 24 as published


def test_encoders_own_norm_reads_its_last_layer() -> None:
    model = make().eval()
    streams: list[Tensor] = []
    model.encoder.layers[-1].register_forward_hook(lambda module, args, output: streams.append(output))
    model.encoder.norm_f.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    model.reconstruct(images())
    assert len(streams) == 2 and torch.equal(streams[0], streams[1])


# What a prediction may depend on


def pixels_of(cluster: int, H: int = 64, W: int = 64, side: int = 32) -> Tensor:
    """True at the pixels of a cluster, (1, 1, H, W)."""
    mask = torch.zeros(1, 1, H, W, dtype=torch.bool)
    row, column = divmod(cluster, W // side)
    mask[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    return mask


@pytest.mark.parametrize("cluster", range(1, 6))
def test_prediction_of_a_cluster_depends_on_the_clusters_before_alone(cluster: int) -> None:
    model = make().eval()
    picture = images(H=64, W=96).requires_grad_()  # 6 clusters
    predicted = to_clusters(model.reconstruct(picture).predicted, (4, 6), 2)
    predicted[:, 4 * cluster : 4 * cluster + 4].sum().backward()
    for other in range(6):
        gradient = picture.grad[pixels_of(other, 64, 96).expand_as(picture)]
        assert gradient.any() == (other < cluster), other


def test_later_pixels_whatever_they_are_leave_a_prediction_bit_for_bit() -> None:
    model, picture = make().eval(), images()
    before = to_clusters(model.reconstruct(picture).predicted, (4, 4), 2)
    for value in (1e4, -3.0):
        later = torch.where(pixels_of(2) | pixels_of(3), torch.tensor(value), picture)
        after = to_clusters(model.reconstruct(later).predicted, (4, 4), 2)
        assert torch.equal(before[:, :12], after[:, :12])
        assert not torch.equal(before[:, 12:], after[:, 12:])


def test_queries_of_a_cluster_read_every_token_of_the_clusters_before() -> None:
    model = make()
    blocked = model._layout_of((4, 4)).blocked
    expected = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    assert torch.equal(blocked, expected.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_query_is_the_place_of_a_patch_of_the_next_cluster() -> None:
    model = make().eval()
    queries: list[Tensor] = []
    model.decoder[0].register_forward_pre_hook(lambda module, args: queries.append(args[0]))
    model.reconstruct(images())
    predicted = [2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    expected = model.query_token + sincos_pos_embed(32, (4, 4))[:, predicted]
    assert torch.equal(queries[0], expected.expand(2, -1, -1))


# The loss


def test_loss_by_hand_counts_all_clusters_but_the_first() -> None:
    model = make(normalize_targets=False)
    picture = torch.zeros(1, 3, 64, 64)
    picture[0, :, :16, 32:48] = 2.0  # patch 2, the first of cluster 1
    hidden = model.reconstruct(picture).hidden
    assert hidden[0].view(4, 4).tolist() == [[False, False, True, True]] * 2 + [[True] * 4] * 2
    predicted = torch.ones(1, 16, 768)
    predicted[0, 0] = 100.0  # in cluster 0: must not count
    # 12 patches: (1 - 2)^2 for patch 2, (1 - 0)^2 for the others
    assert model.loss(picture, Reconstruction(predicted, hidden)).item() == pytest.approx(1.0)
    predicted[0, 2] = 5.0  # (5 - 2)^2 = 9 instead of 1
    assert model.loss(picture, Reconstruction(predicted, hidden)).item() == pytest.approx((11 + 9) / 12)


def test_predictions_are_of_the_patches_they_stand_for() -> None:
    model, picture = make(normalize_targets=False), images()
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.zero_()
        model.decoder_norm.register_forward_hook(lambda module, args, output: output * 0 + marks)
        model.decoder_pred.weight[:, 0] = 1
    marks = torch.zeros(1, 12, 32)
    marks[0, :, 0] = torch.arange(4.0, 16.0)  # a query's place in the order of the clusters
    predicted = model.reconstruct(picture).predicted[0, :, 0]
    places = to_clusters(torch.arange(16).view(1, 16, 1), (4, 4), 2).flatten()
    assert predicted[places].tolist() == [0, 0, 0, 0, *range(4, 16)]


@pytest.mark.parametrize("changes", [{}, {"cluster_size": 1}, {"decoder_depth": 1, "normalize_targets": False}])
def test_a_few_steps_lower_the_loss_and_reach_every_parameter(changes: dict[str, Any]) -> None:
    model, picture = make(**changes), images(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(picture, model.reconstruct(picture))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


def test_bfloat16_autocast_is_finite_with_float32_loss() -> None:
    model, picture = make(), images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(picture, model.reconstruct(picture))
    loss.backward()
    assert loss.dtype is torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model.loss(picture, model.reconstruct(picture)).item()
    assert loss.item() == pytest.approx(exact, rel=0.02)  # 8 bits, an error of 2^-9 per rounding, some dozen of them


# The run


def test_rectangles_and_other_sizes_work() -> None:
    model, picture = make(), images(H=32, W=96)
    result = model.reconstruct(picture)
    assert result.predicted.shape == (2, 12, 768) and result.hidden.sum() == 2 * 8
    assert model.predicted_images(picture, result).shape == picture.shape
    assert model(picture).shape == (2, 32)


def test_run_fits_the_data_and_its_checkpoint_gives_an_encoder_with_four_directions(
    tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    shard = str(write_shard(tmp_path / "train.tar"))
    data = ImageShards(train=shard, val=shard, image_size=64, batch_size=2, num_workers=0)
    model = make(encoder_args=None)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert model.encoder_args == {"img_size": [64, 64]}
    again = load_objective(tmp_path / "last.ckpt").model
    assert torch.equal(again.reconstruct(images()).predicted, model.eval().reconstruct(images()).predicted)
    encoder = ssmpretrain.load_encoder(tmp_path / "last.ckpt")
    assert encoder.directions == 4 and encoder.load_report.fresh == ("cls_token",)
    mixer, pretrained = encoder.layers[0].mixer, model.encoder.layers[0].mixer
    assert torch.equal(mixer.conv1d_c_b.weight, pretrained.conv1d.weight)
    assert torch.equal(encoder.norm_f.weight, model.encoder.norm_f.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "test_vim"}, r"scans in one direction here .*; 'test_vim' does not\. Choose arm_base_patch16_224"),
        ({"encoder_args": {"directions": 4}}, r"one direction.*got encoder_args.directions 4. Leave it out"),
        ({"cluster_size": 0}, "cluster_size is at least 1; got 0"),
        ({"decoder_depth": 0}, "decoder_depth is at least 1"),
        ({"decoder_depth": 4}, r"middle of 4 to the last; got decoder_depth 4. Set it to 3 or less"),
        ({"decoder_embed_dim": 30}, "decoder_embed_dim is a multiple of 4 and of decoder_num_heads=4; got 30"),
        ({"decoder_num_heads": 5}, "decoder_num_heads=5; got 32"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(("H", "W"), [(80, 64), (32, 32)])
def test_images_that_clusters_do_not_tile_are_refused_with_what_fits(H: int, W: int) -> None:
    with pytest.raises(ValueError, match=rf"squares of 32 x 32 pixels.*got {H} x {W}.*multiple of 32, 64 or more"):
        make().reconstruct(images(H=H, W=W))


def test_the_decoder_begins_as_published() -> None:
    block = DecoderBlock(64, 4)
    query, key_and_value = block.attention.in_proj_weight.detach().split([64, 128])
    for weight in (query, key_and_value, block.attention.out_proj.weight.detach(), block.mlp.fc2.weight.detach()):
        assert float(weight.abs().max()) == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.02)
