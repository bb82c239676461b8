import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import ssmpretrain
from ssmpretrain.encoders.vmamba.blocks import PatchMerging
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS, VMamba

# Millions, as published.
NUM_PARAMETERS = {
    "vmamba_tiny_s1l8": 30.25,
    "vmamba_small_s1l20": 49.01,
    "vmamba_base_s1l20": 86.61,
    "vmamba_tiny_s2l5": 30.71,
    "vmamba_small_s2l15": 50.15,
    "vmamba_base_s2l15": 88.56,
    "vmamba_tiny_v0": 22.89,
    "vmamba_small_v0": 44.42,
    "vmamba_base_v0": 76.25,
}
V0 = {"ssm_ratio": 2, "d_state": 16, "conv_bias": True, "gate": True, "mlp_ratio": 0}
V0 |= {"stem": "patch", "downsample": "merge"}
SCANS = ["cross", "unidirectional", "bidirectional", "cascade", ("h", "w2_flip")]


def small(**options) -> VMamba:
    """One block in each of two stages."""
    torch.manual_seed(0)
    return VMamba(**{"embed_dim": 8, "depths": (1, 1), "num_classes": 5, **options})


def names_in(group: dict, model: VMamba) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def mixed_as_published(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mixer in the published order of steps: channels first, four copies of the map, one scan step at a time."""
    (B, H, W, _), E = x.shape, mixer.x_proj_weight.shape[-1]
    R, N = mixer.dt_rank, mixer.d_state
    content = mixer.in_proj(x)
    gate = 1.0
    if mixer.gate:
        content, gate = content[..., :E], F.silu(content[..., E:])
    content = F.silu(mixer.conv2d(content.permute(0, 3, 1, 2).contiguous()))
    rows, columns = content.flatten(2), content.transpose(2, 3).flatten(2)
    outs = []
    for k, u in enumerate([rows, columns, rows.flip(-1), columns.flip(-1)]):
        dt, into, out = (mixer.x_proj_weight[k] @ u).split([R, N, N], dim=1)
        delta = F.softplus(mixer.dt_projs_weight[k] @ dt + mixer.dt_projs_bias[k, :, None])
        decay = -mixer.A_logs.view(4, E, N)[k].exp()
        state, ys = x.new_zeros(B, E, N), []
        for t in range(H * W):
            step = delta[:, :, t, None]
            state = (step * decay).exp() * state + step * u[:, :, t, None] * into[:, None, :, t]
            ys.append((state * out[:, None, :, t]).sum(-1) + mixer.Ds.view(4, E)[k] * u[:, :, t])
        outs.append(torch.stack(ys, -1))
    by_row = outs[0] + outs[2].flip(-1)
    by_column = (outs[1] + outs[3].flip(-1)).view(B, E, W, H).transpose(2, 3).flatten(2)
    return mixer.out_proj(mixer.out_norm((by_row + by_column).view(B, E, H, W).permute(0, 2, 3, 1)) * gate)


# Sizes and parts


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_published_variant_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(NUM_PARAMETERS[name], abs=0.005)


def test_every_registered_name_but_the_test_encoders_is_a_published_one():
    assert VARIANTS.keys() - {"test_vmamba"} == NUM_PARAMETERS.keys()
    assert set(ssmpretrain.list_encoders("vmamba_*")) == NUM_PARAMETERS.keys()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"ssm_ratio": 2}, V0], ids=["s1", "s2", "v0"])
def test_the_mixer_computes_the_published_steps(options):
    mixer = small(**options).layers[0].blocks[0].op.double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixed_as_published(mixer, x))


@torch.no_grad()
@pytest.mark.parametrize("mlp_ratio", [0, 4])
def test_a_block_adds_its_branches_to_the_stream(mlp_ratio):
    block = small(mlp_ratio=mlp_ratio).layers[0].blocks[0]
    x = torch.randn(1, 3, 4, 8)
    expected = x + block.op(block.norm(x))
    if mlp_ratio:
        expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x.clone()), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (1, 1)])
def test_merging_puts_the_neighbour_below_before_the_one_to_the_right(size):
    merging = PatchMerging(8, 16, nn.LayerNorm)
    x = torch.randn(2, *size, 8)
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    quarters = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    torch.testing.assert_close(merging(x), merging.reduction(merging.norm(torch.cat(quarters, -1))))


@pytest.mark.parametrize("scan", SCANS, ids=str)
@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_every_kind_trains_every_parameter(options, scan):
    model = small(**options, scan=scan)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_the_scan_modes_answer_differently():
    images = torch.randn(1, 3, 32, 32)
    answers = []
    for scan in SCANS[:4]:
        model = small(scan=scan).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        answers.append(model(images))
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(answers) for b in answers[:i])


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "image", "feature_map"),
    [
        ({}, (32, 32), (4, 4)),
        ({}, (33, 50), (5, 7)),
        ({}, (1, 1), (1, 1)),
        (V0, (32, 64), (4, 8)),
        (V0, (37, 29), (5, 4)),
        ({"downsample": "conv2"}, (37, 29), (5, 4)),
    ],
)
def test_images_of_any_size_are_taken(options, image, feature_map):
    model = small(**options)
    assert model.forward_features(torch.randn(2, 3, *image)).shape == (2, *feature_map, 16)
    assert model(torch.randn(2, 3, *image)).shape == (2, 5)


@torch.no_grad()
def test_the_memory_layout_of_the_images_does_not_matter():
    model = small()
    images = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), model(images))


@torch.no_grad()
def test_every_map_inside_is_contiguous_and_channel_last():
    model = small()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    model(torch.randn(2, 3, 32, 40))
    assert len(seen) == 2 + 2 * 3 + 1 + 1
    assert all(seen)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.randn(3, 64, 64), r"torch.float32 \(3, 64, 64\)"),
        (torch.randn(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_something_else_than_images_is_refused(images, got):
    for method in (VMamba.forward, VMamba.forward_intermediates):
        with pytest.raises(ValueError, match=rf"floating-point \(batch, 3, height, width\); got .*{got}"):
            method(small(), images)


@pytest.mark.parametrize(("options", "least"), [({}, 1), (V0, 4), ({"downsample": "conv2"}, 8)])
def test_an_image_too_small_is_refused_with_the_least_size(options, least):
    model = small(**options)
    assert model(torch.randn(1, 3, least, least)).shape == (1, 5)
    with pytest.raises(ValueError, match=rf"at least {least} x {least} pixels; got {least} x {least - 1}"):
        model(torch.randn(1, 3, least, least - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "token"}, "global_pool is one of avg, max or empty; got 'token'"),
        ({"stem": "v1"}, "stem is one of patch, conv; got 'v1'"),
        ({"downsample": "v3"}, "downsample is one of merge, conv2, conv3; got 'v3'"),
        ({"scan": "spiral"}, "'spiral'"),
        ({"scan": ("h", "diagonal")}, "'diagonal'"),
        ({"scan": ()}, "scan"),
        ({"embed_dim": (8, 16, 32)}, r"one number per stage; got \[8, 16, 32\] and \[1, 1\]"),
        ({"depths": ()}, "one number per stage"),
        ({"depths": (1, 0)}, r"depths is at least 1; got \[1, 0\]"),
        ({"embed_dim": 0}, r"embed_dim is at least 1; got \[0, 0\]"),
        ({"d_state": 0}, "d_state is at least 1; got 0"),
        ({"dt_rank": 0}, "dt_rank is at least 1; got 0"),
        ({"dt_rank": "full"}, "dt_rank is a number or 'auto'; got 'full'"),
        ({"d_conv": 4}, "d_conv is odd, .*; got 4"),
        ({"ssm_ratio": 0.1}, r"ssm_ratio \* embed_dim is finite and at least 1; got 0.1 \* 8"),
        ({"mlp_ratio": -1}, "mlp_ratio is finite and at least 0; got -1"),
        ({"in_chans": 0}, "in_chans is at least 1; got 0"),
        ({"num_classes": -1}, "num_classes is at least 0; got -1"),
        ({"drop_rate": 1.0}, r"drop_rate is in \[0, 1\); got 1.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate is in \[0, 1\); got -0.1"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Agreement with the published model


@torch.no_grad()
def test_vmamba_tiny_answers_as_published(goldens, formula):
    model = ssmpretrain.create_encoder("vmamba_tiny_s1l8").eval()
    model.load_state_dict(formula.state_dict(model.state_dict()))
    answer = model(formula.images())
    expected = torch.from_numpy(np.load(goldens / "vmamba_tiny_s1l8.npz")["logits"])
    # float32 through 14 blocks of up to 3136 steps agrees to 1e-6 between scans; 1e-4 is the promise.
    assert (answer - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_initial_values_are_as_published(options):
    model = small(embed_dim=64, **options)
    mixer = model.layers[1].blocks[0].op
    for weight in (mixer.in_proj.weight, mixer.out_proj.weight, model.get_classifier().weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.get_classifier().bias.any()
    states = torch.arange(1, mixer.d_state + 1).float()
    torch.testing.assert_close(mixer.A_logs.exp(), states.expand_as(mixer.A_logs))
    assert torch.equal(mixer.Ds, torch.ones_like(mixer.Ds))
    steps = F.softplus(mixer.dt_projs_bias.detach()).log()
    assert np.log(9.9e-4) < steps.min()
    assert steps.max() < np.log(0.101)
    assert steps.mean().item() == pytest.approx(np.log(0.01), abs=0.2)
    for weight in (mixer.x_proj_weight, mixer.dt_projs_weight):
        assert weight.abs().max().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.05)


# Precision and training


@pytest.mark.parametrize("masked", [False, True])
def test_scans_whose_sum_exceeds_float16_are_normed_as_published(masked):
    """The published scan hands float32 to the norm, which makes any size of it harmless."""
    torch.manual_seed(0)
    model = small()
    for name, parameter in model.named_parameters():
        if name.endswith(".Ds"):
            nn.init.constant_(parameter, 1e7)
    images, keep = torch.randn(2, 3, 64, 64), torch.tensor([[0, 2, 3], [1, 2, 3]])
    run = (lambda: model.forward_visible(images, keep)) if masked else (lambda: model(images))
    expected = run()
    with torch.autocast("cpu", torch.float16):
        given = run()
    assert (given - expected).norm() / expected.norm() < 0.02
    given.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_the_stream_is_float32_under_autocast_and_in_a_bfloat16_model():
    images = torch.randn(2, 3, 32, 32)
    exact = small().eval().forward_features(images)
    streams = []
    for options in ({}, V0):
        model = small(**options).eval()
        for block in [block for stage in model.layers for block in stage.blocks]:
            block.register_forward_hook(lambda module, inputs, output: streams.extend([inputs[0], output]))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.forward_features(images)
        low = model.bfloat16().forward_features(images.bfloat16())
        assert (mixed.dtype, low.dtype) == (torch.float32, torch.bfloat16)
        if not options:
            # bfloat16 keeps 8 bits, 4e-3; a handful of roundings per branch add up to a few of these.
            for answer in (mixed, low.float()):
                assert (answer - exact).norm() / exact.norm() < 1.5e-2
    assert {stream.dtype for stream in streams} == {torch.float32}


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_graph_captures_the_whole_model(train):
    model = small().train(train)
    images = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


def test_gradient_checkpointing_runs_each_block_twice_and_gives_the_same_bits():
    model = small(depths=(2, 2), drop_path_rate=0.2)
    images = torch.randn(2, 3, 32, 32)
    gradients, runs = [], []
    model.layers[1].blocks[1].mlp.register_forward_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert runs == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stochastic_depth_rises_linearly_over_all_stages():
    model = small(depths=(2, 3), drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_thins_what_the_head_reads_in_training_only():
    model = small(drop_rate=0.5)
    features = torch.ones(64, 2, 2, 16)
    assert set(model.forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(64, 16))


# timm's vocabulary


@torch.no_grad()
def test_the_whole_is_its_parts():
    model = small().eval()
    images = torch.randn(2, 3, 32, 48)
    features = model.forward_features(images)
    assert features.shape == (2, 4, 6, 16)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    assert torch.equal(model(images), model.classifier.head(pooled))
    model.reset_classifier(5, "max")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((1, 2)))
    model.reset_classifier(5, "")
    assert model(images).shape == (2, 4, 6, 5)


@torch.no_grad()
def test_intermediates_are_the_maps_at_the_end_of_each_stage():
    model = small(depths=(1, 2, 1))
    images = torch.randn(2, 3, 32, 48)
    ends = []
    for stage in model.layers:
        stage.blocks[-1].register_forward_hook(lambda module, inputs, output: ends.append(output.clone()))
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 12), (2, 16, 4, 6), (2, 32, 2, 3)]
    assert all(torch.equal(m, end.permute(0, 3, 1, 2)) for m, end in zip(maps, ends, strict=True))
    assert torch.equal(final, model.forward_features(images))
    plain, normed = model.forward_intermediates(images, [1, -1], norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(plain, ends[1])
    assert torch.equal(normed, final)


@torch.no_grad()
def test_intermediates_can_stop_early():
    model = small(depths=(1, 1, 1))
    calls = []
    model.layers[2].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    final, maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), [0, 1], stop_early=True)
    assert not calls
    assert torch.equal(final.permute(0, 3, 1, 2), maps[1])


def test_an_index_out_of_range_and_an_unknown_format_are_refused():
    model, images = small(), torch.randn(1, 3, 32, 32)
    for indices in ([2], [-3], 3, 0, []):
        with pytest.raises(ValueError, match="indices name some of 2 stages"):
            model.forward_intermediates(images, indices)
    with pytest.raises(ValueError, match="NCHW or NHWC; got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@torch.no_grad()
def test_pruning_keeps_the_features_and_drops_the_rest():
    model = small(depths=(1, 1, 1))
    images = torch.randn(1, 3, 32, 32)
    before = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    after = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(model.layers) == 2
    assert not [name for name, _ in model.named_parameters() if "layers.1.downsample" in name or "classifier" in name]


@torch.no_grad()
@pytest.mark.parametrize("out_indices", [None, (1, 3)])
def test_features_only_gives_maps_for_a_detector(out_indices):
    options = {} if out_indices is None else {"out_indices": out_indices}
    model = timm.create_model("test_vmamba", features_only=True, **options)
    taken = out_indices or (0, 1, 2, 3)
    maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16 * 2**i, 16 // 2**i, 24 // 2**i) for i in taken]
    assert model.feature_info.channels() == [16 * 2**i for i in taken]
    assert model.feature_info.reduction() == [4 * 2**i for i in taken]
    last = {0: 0, 1: 0, 2: 1, 3: 0}  # block of each stage
    assert model.feature_info.module_name() == [f"layers.{i}.blocks.{last[i]}" for i in taken]


def test_the_classifier_can_be_read_replaced_and_removed():
    model = small()
    assert model.get_classifier() is model.classifier.head
    model.reset_classifier(7, "max")
    assert (model.get_classifier().out_features, model.num_classes, model.global_pool) == (7, 7, "max")
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="global_pool is one of"):
        model.reset_classifier(3, "mean")


def test_the_configuration_tells_timm_how_to_prepare_images():
    model = timm.create_model("test_vmamba")
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)
    modules = dict(model.named_modules())
    assert modules[model.pretrained_cfg["classifier"]] is model.get_classifier()
    assert isinstance(modules[model.pretrained_cfg["first_conv"]], nn.Conv2d)
    assert all(info["module"] in modules for info in model.feature_info)


def test_layer_decay_gives_each_block_its_own_rate():
    model = timm.create_model("test_vmamba")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    rate_of = {name: group["lr_scale"] for group in groups for name in names_in(group, model)}
    assert len(rate_of) == len(list(model.parameters()))
    # the stem, five blocks, the head
    assert sorted(set(rate_of.values())) == [0.5**i for i in range(6, -1, -1)]
    blocks = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"]
    for i, block in enumerate(blocks):
        assert {rate for name, rate in rate_of.items() if name.startswith(block)} == {0.5 ** (5 - i)}
    assert rate_of["patch_embed.0.weight"] == 0.5**6
    assert rate_of["layers.0.downsample.1.weight"] == rate_of["layers.0.blocks.0.norm.weight"]
    assert rate_of["classifier.norm.weight"] == 1
    assert rate_of["classifier.head.weight"] == 1
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 1 + 4 + 1


@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_weight_decay_spares_what_it_would_harm(options):
    model = small(**options)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = set().union(*(names_in(group, model) for group in groups if group["weight_decay"]))
    kinds = {name.split(".op.")[-1] for name in decayed if ".op." in name}
    assert kinds == {"in_proj.weight", "conv2d.weight", "x_proj_weight", "dt_projs_weight", "out_proj.weight"}
    assert model.no_weight_decay() <= set(model.state_dict())


def test_timms_optimizer_factory_finds_both():
    model = timm.create_model("test_vmamba")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.75**i for i in range(7)}
