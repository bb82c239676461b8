import math

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

import ssmpretrain
from ssmpretrain.encoders.sequence.pos_embed import resize_grid, sincos_pos_embed
from ssmpretrain.encoders.vim.vim import Vim

# Published sizes; the official model cards round them to 7, 26 and 98 M.
NUM_PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
}
STRATEGIES = [("none", "avg"), ("none", "max"), ("head", "token"), ("double", "token"), ("middle", "token")]
DIRECTIONS = ["ssm_conv", "none", "sequence", "layer", "ssm"]


def small(**options) -> Vim:
    """Two blocks on a 4 x 4 grid."""
    torch.manual_seed(0)
    return Vim(**{"img_size": 64, "embed_dim": 16, "depth": 2, "num_classes": 5, **options})


def silence_blocks(model: Vim) -> Vim:
    """Let every block add nothing, so that the features are the normed tokens."""
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.out_proj.weight.zero_()
    return model


def names_in(group: dict, model: Vim) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


# Sizes and tokens


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_published_variant_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]


def test_the_large_variant_is_1024_wide_and_48_deep():
    with torch.device("meta"):
        model = timm.create_model("vim_large_patch16_224", num_classes=0)
    assert (model.embed_dim, len(model.layers), model.num_features) == (1024, 48, 1024)


def test_the_test_variant_is_small():
    assert sum(parameter.numel() for parameter in timm.create_model("test_vim", num_classes=0).parameters()) < 100_000


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize(("class_token", "global_pool"), STRATEGIES)
def test_every_strategy_trains_every_parameter(directions, class_token, global_pool):
    model = small(bidirectional=directions, class_token=class_token, global_pool=global_pool)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_the_strategies_read_what_the_paper_says():
    images = torch.randn(2, 3, 64, 64)
    features = torch.randn(2, 16, 16)  # without a class token, features are the patches
    mean, largest = small(class_token="none"), small(class_token="none", global_pool="max")
    assert mean.global_pool == "avg"
    torch.testing.assert_close(mean.forward_head(features), mean.head(features.mean(1)))
    torch.testing.assert_close(largest.forward_head(features), largest.head(features).amax(1))
    for kind, positions in {"middle": [8], "head": [0], "double": [0, 17]}.items():
        model = small(class_token=kind)
        assert model.global_pool == "token"
        features = model.forward_features(images)
        pooled = features[:, positions].mean(1)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(model(images), model.head(pooled))
        class_feature, patches = model.split_tokens(features)
        torch.testing.assert_close(class_feature, pooled)
        assert patches.shape == (2, 16, 16)
    assert mean.split_tokens(features)[0] is None


@torch.no_grad()
def test_mean_pooling_leaves_the_class_token_out():
    model = small(global_pool="avg")
    features = torch.randn(2, 17, 16)
    patches = torch.cat([features[:, :8], features[:, 9:]], 1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), patches.mean(1))


@torch.no_grad()
def test_the_whole_is_its_parts():
    model = small()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.forward_features(images), model.forward_tokens(model.embed(images)))
    assert torch.equal(model(images), model.forward_head(model.forward_features(images)))


@torch.no_grad()
@pytest.mark.parametrize("num_kept", [1, 4, 7])
def test_the_class_token_stands_in_the_middle_of_the_patches_it_is_given(num_kept):
    model = silence_blocks(small())
    kept = model.embed(torch.randn(2, 3, 64, 64))[:, torch.arange(num_kept)]
    features = model.forward_tokens(kept)
    middle = num_kept // 2
    class_token = (model.cls_token + model.pos_embed[:, 8:9]).expand(
        2, -1, -1
    )  # its row stays the whole table's middle
    expected = torch.cat([kept[:, :middle], class_token, kept[:, middle:]], 1)
    torch.testing.assert_close(features, model.norm_f(expected))


# Position embedding and image sizes


@torch.no_grad()
def test_a_rectangle_gets_the_resized_embedding():
    model = small()
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    tokens = model.embed(torch.randn(1, 3, 96, 48))
    rows = torch.cat([model.pos_embed[:, :8], model.pos_embed[:, 9:]], 1)
    torch.testing.assert_close(tokens, resize_grid(rows, (4, 4), (6, 3)))
    assert model(torch.randn(1, 3, 96, 48)).shape == (1, 5)


@torch.no_grad()
def test_setting_the_input_size_gives_the_answers_of_resizing_on_the_way():
    model = small()
    images = torch.randn(1, 3, 96, 48)
    before = model(images)
    model.set_input_size((96, 48))
    assert model.pos_embed.shape == (1, 19, 16)
    torch.testing.assert_close(model(images), before)


def test_overlapping_patches_have_the_published_grid():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_stride8_224")
    assert model.patch_embed.grid_size == (27, 27)
    assert model.feature_info[0]["reduction"] == 8


def test_the_fixed_embedding_is_not_trained_and_zero_at_the_class_token():
    model = small(pos_embed="sincos")
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[:, 8], torch.zeros(1, 16))
    grid = torch.cat([model.pos_embed[:, :8], model.pos_embed[:, 9:]], 1)
    assert torch.equal(grid, sincos_pos_embed(16, (4, 4)))


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((1, 3, 100, 64), 16, "got an image of 100 x 64.*Resize or crop its height from 100 to 96 or 112 pixels"),
        ((1, 3, 64, 70), 8, "every 8 pixels.*width from 70 to 64 or 72 pixels"),
        ((1, 3, 64, 9), 16, "width from 9 to 16 pixels"),
    ],
)
def test_an_image_that_patches_do_not_fill_is_refused_with_the_nearest_sizes(shape, stride, message):
    with pytest.raises(ValueError, match=message):
        small(stride=stride)(torch.randn(shape))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.randn(3, 64, 64), r"torch.float32 \(3, 64, 64\)"),
        (torch.randn(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_something_else_than_images_is_refused(images, got):
    for method in (Vim.forward, Vim.forward_intermediates):
        with pytest.raises(ValueError, match=rf"floating-point \(batch, 3, height, width\); got .*{got}"):
            method(small(), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": "tail"}, "class_token is one of"),
        ({"global_pool": "mean"}, "global_pool is one of token, avg, max, concat or empty; got 'mean'"),
        ({"class_token": "none", "global_pool": "token"}, "class_token is 'none'"),
        ({"pos_embed": "rope"}, "pos_embed is one of learned, sincos; got 'rope'"),
        ({"pos_embed": "sincos", "embed_dim": 18}, "divisible by 4; got 18"),
        ({"img_size": 100}, "Resize or crop its height from 100 to 96 or 112"),
        ({"img_size": (64, 64, 3)}, "img_size is one number of pixels"),
        ({"num_classes": -1}, "num_classes is at least 0"),
        ({"drop_rate": 1.0}, "drop_rate is in"),
        ({"stride": 0}, "stride is at least 1"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Agreement with the published model


@torch.no_grad()
def test_vim_tiny_answers_as_published(goldens, formula):
    golden = np.load(goldens / "vim_tiny.npz")
    model = ssmpretrain.create_encoder("vim_tiny_patch16_224").eval()
    model.load_state_dict(formula.state_dict(model.state_dict()))
    features = model.forward_features(formula.images())
    answers = {"logits": model.forward_head(features), "features": model.forward_head(features, pre_logits=True)}
    for name, answer in answers.items():
        expected = torch.from_numpy(golden[name])
        # float32 through 24 blocks of 197 steps agrees to 2e-6 between scans; 1e-4 is the promise.
        assert (answer - expected).norm() / expected.norm() < 1e-4, name


@pytest.mark.parametrize("train", [False, True])
def test_one_graph_captures_the_whole_model(train):
    # Captured and differentiated ahead of time, but not compiled: generating code takes most of a minute.
    model = small().train(train)
    images = torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


# timm's vocabulary


@torch.no_grad()
@pytest.mark.parametrize("directions", ["ssm_conv", "layer"])
def test_intermediates_are_the_stream_after_each_block(directions):
    model = small(depth=4, bidirectional=directions)
    images = torch.randn(2, 3, 64, 96)
    final, maps = model.forward_intermediates(images)
    count = 4 if directions == "ssm_conv" else 2
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 6)] * count
    assert torch.equal(final, model.forward_features(images))
    tokens = model.forward_intermediates(images, [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(tokens, model.split_tokens(final)[1])
    as_map = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(as_map.flatten(2).transpose(1, 2), tokens)


@torch.no_grad()
def test_intermediates_can_stop_early_and_bring_the_class_tokens():
    model = small(depth=4, class_token="double")
    images = torch.randn(2, 3, 64, 64)
    calls = []
    model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    final, pairs = model.forward_intermediates(images, [0, 1], stop_early=True, return_prefix_tokens=True)
    assert not calls
    patches, class_tokens = pairs[1]
    assert patches.shape == (2, 16, 4, 4)
    assert class_tokens.shape == (2, 2, 16)
    torch.testing.assert_close(model.norm_f(class_tokens[:, 0]), final[:, 0])


@torch.no_grad()
def test_intermediates_of_a_reversed_sequence_are_in_raster_order():
    model = silence_blocks(small(bidirectional="sequence", flip_probability=1.0))
    images = torch.randn(1, 3, 64, 64)
    final, tokens = model.forward_intermediates(images, 1, output_fmt="NLC")
    torch.testing.assert_close(tokens[0], model.embed(images))
    torch.testing.assert_close(final, model.forward_features(images))


def test_an_index_out_of_range_and_an_unknown_format_are_refused():
    model, images = small(), torch.randn(1, 3, 64, 64)
    for indices in ([2], [-3], 3, 0, []):
        with pytest.raises(ValueError, match="indices name some of 2 blocks"):
            model.forward_intermediates(images, indices)
    with pytest.raises(ValueError, match="NCHW or NLC; got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


@torch.no_grad()
def test_pruning_keeps_the_features_and_drops_the_rest():
    model = small(depth=4)
    images = torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -3], prune_norm=True) == [0, 1]
    after = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(model.layers) == 2
    assert isinstance(model.norm_f, torch.nn.Identity)
    assert model.num_classes == 0


@torch.no_grad()
def test_features_only_gives_maps_for_a_detector():
    model = timm.create_model("test_vim", features_only=True, out_indices=(1, 3), img_size=64)
    maps = model(torch.randn(2, 3, 64, 128))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 8)] * 2
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [16, 16]
    assert model.feature_info.module_name() == ["layers.1", "layers.3"]


def test_the_classifier_can_be_read_replaced_and_removed():
    model = small()
    assert model.get_classifier() is model.head
    model.reset_classifier(7, "avg")
    assert (model.head.out_features, model.num_classes, model.global_pool) == (7, 7, "avg")
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="global_pool is one of"):
        model.reset_classifier(3, "mean")


def test_the_configuration_tells_timm_how_to_prepare_images():
    model = timm.create_model("test_vim")
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)
    assert model.pretrained_cfg["classifier"] == "head"
    assert dict(model.named_modules())[model.pretrained_cfg["first_conv"]] is model.patch_embed.proj


@pytest.mark.parametrize(("pairs", "num_groups"), [(False, 6), (True, 4)])
def test_layer_decay_gives_each_block_or_pair_its_own_rate(pairs, num_groups):
    model = timm.create_model("test_vim", layer_decay_pairs=pairs)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    rate_of = {name: group["lr_scale"] for group in groups for name in names_in(group, model)}
    assert len(rate_of) == len(list(model.parameters()))
    # embeddings, then blocks (or pairs) one step apart, the final norm and the head at the full rate
    assert sorted(set(rate_of.values())) == [0.5**i for i in range(num_groups - 1, -1, -1)]
    step = 2 if pairs else 1
    for i in range(4):
        scales = {rate for name, rate in rate_of.items() if name.startswith(f"layers.{i}.")}
        assert scales == {0.5 ** (num_groups - 2 - i // step)}
    assert rate_of["norm_f.weight"] == 1
    assert rate_of["head.weight"] == 1
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {rate_of[name] for name in stem} == {0.5 ** (num_groups - 1)}


@pytest.mark.parametrize("class_token", ["middle", "double", "none"])
def test_weight_decay_spares_what_it_would_harm(class_token):
    model = small(class_token=class_token)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = set().union(*(names_in(group, model) for group in groups if group["weight_decay"]))
    kinds = {name.split("mixer.")[-1] for name in decayed}
    weights = {"in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"}
    assert kinds == {f"{name}.weight" for name in weights} | {"patch_embed.proj.weight", "head.weight"}
    assert model.no_weight_decay() <= set(model.state_dict())
    assert {"layers.0.mixer.dt_proj.bias", "layers.1.mixer.D_b"} <= model.no_weight_decay()


def test_timms_optimizer_factory_finds_both():
    model = timm.create_model("test_vim")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.75**i for i in range(4)}


def test_gradient_checkpointing_gives_the_same_bits():
    model = small(drop_path_rate=0.2)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_embedding_initial_values_are_as_published():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", embed_dim=256, depth=1)
    fan_in = 3 * 16 * 16
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert not model.patch_embed.proj.bias.any()
    assert not model.head.bias.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    model = ssmpretrain.create_encoder("test_vim", num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    results = []
    for device in ("cpu", "cuda"):
        model = model.to(device).train()
        model.zero_grad()
        logits = model(images.to(device))
        logits.square().mean().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert (ours.cpu() - expected).norm() <= 1e-4 * expected.norm() + 1e-7
