"""Layers, learning rates and weight decay of an encoder's parameters, against the published rules written out."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

import ssmpretrain
from ssmpretrain.objectives import MAE, Finetune
from ssmpretrain.training.optim.adamw import AdamW, parameter_groups
from ssmpretrain.training.optim.parameter_table import group_table
from ssmpretrain.training.optim.schedules import Cosine

EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed")


def shapes_only(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return ssmpretrain.create_encoder(name, num_classes=10, **arguments)


def scales(encoder: nn.Module, layer_decay: float) -> dict[str, float]:
    groups = parameter_groups(encoder, 0.05, "matrices", layer_decay)
    return {name: group["lr_scale"] for group in groups for name in group["param_names"]}


def published(names: list[str], depth: int, distance: Callable[[int, int], int], decay: float) -> dict[str, float]:
    """Scale of each name; `distance` from the head of the n-th of depth + 2 layers, the embeddings being the 0-th."""
    rule = {}
    for name in names:
        part, _, number = name.partition(".")
        layer = depth + 1  # the norm, the head
        if part.startswith(EMBEDDINGS):
            layer = 0
        elif part in ("layers", "blocks"):
            layer = int(number.split(".")[0]) + 1
        rule[name] = decay ** distance(layer, depth + 1)
    return rule


def by_block(layer: int, top: int) -> int:
    """facebookresearch/mae, util/lr_decay.py."""
    return top - layer


def by_pair(layer: int, top: int) -> int:
    """insitro/FastVim, mae/lr_decay.py."""
    return (top - layer) // 2 + (top - layer) % 2


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7, 24])
def test_masked_vims_rule_at_every_depth(depth: int) -> None:
    encoder = shapes_only("test_vim", depth=depth)
    assert scales(encoder, 0.65) == published([*encoder.state_dict()], depth, by_pair, 0.65)


def test_the_24_blocks_of_vim_are_12_layers() -> None:
    of = scales(shapes_only("vim_base_patch16_224"), 0.5)
    assert [of[f"layers.{block}.mixer.D"] for block in (0, 1, 2, 22, 23)] == [0.5**n for n in (12, 12, 11, 1, 1)]
    assert of["patch_embed.proj.weight"] == 0.5**13 and of["norm_f.weight"] == of["head.weight"] == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vim", {"depth": 3, "layer_decay_pairs": False}),
        ("test_arm", {"depth": 3}),
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg"}),  # pooled, then fc_norm
        ("vit_tiny_patch16_224", {"depth": 3}),  # norm, then the class token
        ("deit_tiny_patch16_224", {"depth": 3}),
    ],
)
def test_maes_rule_for_all_others_that_keep_one_sequence(name: str, arguments: dict) -> None:
    encoder = shapes_only(name, **arguments)
    names = [name for name, _ in encoder.named_parameters()]
    assert scales(encoder, 0.75) == published(names, 3, by_block, 0.75)


def test_a_pooled_vit_has_maes_groups_weight_decay_included() -> None:
    encoder = shapes_only("vit_base_patch16_224", global_pool="avg")
    groups = AdamW(lr_per_256=1.0, weight_decay=0.05).build(encoder, 512, layer_decay=0.65).param_groups
    assert len(groups) == 2 * 14
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0 if spared else 0.05), name
        assert group["lr"] == 2 * 0.65 ** (13 - group["layer"])


def test_vmambas_blocks_fall_one_by_one_across_its_stages() -> None:
    of = scales(shapes_only("vmamba_tiny_s1l8"), 0.5)
    blocks = [f"layers.{stage}.blocks.{block}." for stage, depth in enumerate((2, 2, 8, 2)) for block in range(depth)]
    for number, block in enumerate(blocks):
        assert {scale for name, scale in of.items() if name.startswith(block)} == {0.5 ** (14 - number)}
    assert of["patch_embed.0.weight"] == 0.5**15
    for stage, depth in enumerate((2, 2, 8)):  # microsoft/SimMIM, optimizer.py, get_swin_layer: "reduction"
        assert of[f"layers.{stage}.downsample.1.weight"] == of[f"layers.{stage}.blocks.{depth - 1}.norm.weight"]
    assert of["classifier.norm.weight"] == of["classifier.head.weight"] == 1


def test_swins_downsampling_has_the_scales_of_simmim() -> None:
    """microsoft/SimMIM, optimizer.py, get_swin_layer: what joins stages is in layer sum(depths[: stage + 1])."""
    of = scales(shapes_only("swin_base_patch4_window7_224"), 0.9)
    depths = (2, 2, 18, 2)
    for stage in (1, 2, 3):  # timm has at the head of a stage what is at the end of the one before it there
        expected = 0.9 ** (sum(depths) + 1 - sum(depths[:stage]))
        joint = {scale for name, scale in of.items() if name.startswith(f"layers.{stage}.downsample.")}
        assert joint == {expected} == {of[f"layers.{stage - 1}.blocks.{depths[stage - 1] - 1}.norm1.weight"]}
    rounded = [round(of[f"layers.{stage}.downsample.reduction.weight"], 4) for stage in (1, 2, 3)]
    assert rounded == [0.0886, 0.1094, 0.7290]


def test_mambaouts_downsampling_goes_with_the_block_before_it() -> None:
    encoder = shapes_only("test_mambaout")
    of = scales(encoder, 0.5)
    stages = [len(stage.blocks) for stage in encoder.stages]
    assert len({*of.values()}) == sum(stages) + 2
    for stage, depth in enumerate(stages[:-1]):
        before = of[f"stages.{stage}.blocks.{depth - 1}.norm.weight"]
        joint = {scale for name, scale in of.items() if name.startswith(f"stages.{stage + 1}.downsample.")}
        assert joint == {before} != {of[f"stages.{stage + 1}.blocks.0.norm.weight"]}


def test_a_frozen_position_embedding_changes_no_other_layer() -> None:
    learned, fixed = (scales(shapes_only("test_vim", pos_embed=kind), 0.5) for kind in ("learned", "sincos"))
    assert learned.items() - fixed.items() == {("pos_embed", 0.5**3)} and fixed.items() <= learned.items()


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = AdamW().build(shapes_only("test_vim"), 256).param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.05), (1, 0)]


def test_what_an_objective_has_beside_its_encoder_is_trained_at_the_full_rate() -> None:
    groups = parameter_groups(MAE("test_vim", decoder_embed_dim=32), 0.05, "matrices", 0.5)
    of = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert {scale for name, scale in of.items() if not name.startswith("encoder.")} == {1}
    assert of["encoder.patch_embed.proj.weight"] == 0.5**3


def test_the_schedule_keeps_the_ratio_of_the_layers() -> None:
    model = Finetune("test_vim", {"depth": 2}, num_classes=3, layer_decay=0.5, optimizer=AdamW(lr_per_256=1.0))
    optimizer = model.build_optimizer(256)
    scheduler = Cosine(warmup_epochs=1, final_fraction=0.1).build(optimizer, total_steps=8, steps_per_epoch=2)
    for _ in range(9):
        assert {Fraction(group["lr"]) / Fraction(group["lr_scale"]) for group in optimizer.param_groups} == {
            Fraction(optimizer.param_groups[-1]["lr"])
        }
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("vim_tiny_patch16_224", {"A_log", "A_b_log"}),
        ("vmamba_tiny_s1l8", {"A_logs", "dt_projs_bias"}),
        ("test_arm", {"A_log", "A_b_log", "A_c_log", "A_c_b_log"}),
    ],
)
def test_by_dimension_decays_the_matrices_that_the_released_code_decays(name: str, decayed: set[str]) -> None:
    encoder = shapes_only(name)
    by_meaning, by_dimension = (
        set(parameter_groups(encoder, 0.05, decay)[0]["param_names"]) for decay in ("matrices", "by_dimension")
    )
    assert by_meaning < by_dimension
    more = {name.rsplit(".", 1)[-1] for name in by_dimension - by_meaning}
    assert more - {"Ds"} == decayed
    spared = {n for n, p in encoder.named_parameters() if p.ndim == 1 or n in ("pos_embed", "cls_token")}
    assert by_dimension == {n for n, _ in encoder.named_parameters()} - spared


def test_by_dimension_spares_what_is_called_bias_whatever_its_shape() -> None:
    module = nn.Module()
    module.bias, module.dt_projs_bias = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    holder = nn.ModuleDict({"scan": module})
    assert parameter_groups(holder, 0.05, "by_dimension")[0]["param_names"] == ["scan.dt_projs_bias"]
    assert len(parameter_groups(holder, 0.05, "matrices")[0]["param_names"]) == 2


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8", "test_vit"])
def test_the_rule_of_clip_spares_vectors_and_whatever_has_bias_in_its_name(name: str) -> None:
    encoder = shapes_only(name)
    spared = {
        n for n, p in encoder.named_parameters() if p.ndim < 2 or "bias" in n
    }  # open_clip's, its norms are vectors
    groups = parameter_groups(encoder, 0.5, "clip")
    assert set(groups[0]["param_names"]) == {n for n, _ in encoder.named_parameters()} - spared
    decayed = {n.rsplit(".", 1)[-1] for n in groups[0]["param_names"]}
    assert decayed & {"pos_embed", "cls_token", "A_logs", "A_log"} and "dt_projs_bias" not in decayed


def test_the_table_names_every_parameter_with_its_rate() -> None:
    encoder = shapes_only("test_vim", depth=2)
    table = group_table(parameter_groups(encoder, 0.05, "matrices", 0.5))
    lines = table.splitlines()
    assert lines[0].split() == ["group", "layer", "lr", "scale", "weight", "decay", "tensors", "parameters"]
    assert lines[1].split() == ["0", "0", "0.25", "0.05", "1", "24,576"]
    assert set(table.split()) >= {name for name, _ in encoder.named_parameters()}
