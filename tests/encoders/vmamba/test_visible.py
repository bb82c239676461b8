"""VMamba on visible patches alone."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from packed_scans import draw_positions, packed_scan_loop
from torch import Tensor, nn

from ssmpretrain.encoders.vmamba.vmamba import VMamba

V0 = {"ssm_ratio": 2, "d_state": 16, "conv_bias": True, "gate": True, "mlp_ratio": 0}
V0 |= {"stem": "patch", "downsample": "merge"}
KINDS = {
    "s1": {},
    "s2": {"ssm_ratio": 2},
    "v0": V0,
    "patches": {"stem": "patch", "downsample": "conv2", "conv_bias": True, "d_conv": 5},
    "v0 with an overlapping stem": {**V0, "stem": "conv", "downsample": "conv3"},
    "routes": {"scan": ("h", "w3", "v_flip", "w3_flip")},
    "bidirectional": {"scan": "bidirectional"},
}
SIZE = (48, 80)  # 3 x 5 patches of 16 pixels for three stages
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def small(**options) -> VMamba:
    """One block in each of three stages, and parameters that make every branch count."""
    torch.manual_seed(0)
    model = VMamba(**{"embed_dim": 8, "depths": (1, 1, 1), "num_classes": 0, **options})
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "reduction.weight", "bias")):
            nn.init.normal_(parameter, std=0.3)
    return model


def pixels_of(keep: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """True at visible pixels or positions, (B, 1, height, width), patch by patch."""
    visible = torch.zeros(len(keep), 1, *size, dtype=torch.bool)
    for image, patches in enumerate(keep.tolist()):
        for patch in patches:
            row, column = (side * index for index in divmod(patch, size[1] // side))
            visible[image, :, row : row + side, column : column + side] = True
    return visible


def all_patches(batch: int, count: int = 15) -> Tensor:
    return torch.arange(count).expand(batch, -1)


# The whole encoder from its definition: whole maps, zeros at hidden positions before every convolution, scans by a loop


def visible_at(keep: Tensor, x: Tensor) -> Tensor:
    """The visible positions of a map (B, H, W, C) of images of `SIZE`, (B, H, W, 1)."""
    return pixels_of(keep, (x.shape[1], x.shape[2]), x.shape[1] // (SIZE[0] // 16)).movedim(1, -1)


def run_zeroed(layers: nn.Sequential, x: Tensor, keep: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = x * visible_at(keep, x.movedim(1, -1)).movedim(-1, 1)
        x = layer(x)
    return x


def mixed_by_definition(mixer: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    (B, H, W, _), (K, _, E) = x.shape, mixer.x_proj_weight.shape
    content = mixer.in_proj(x)
    gate = 1.0
    if mixer.gate:
        content, gate = content[..., :E], F.silu(content[..., E:])
    visible = visible_at(keep, x)
    content = F.silu(mixer.conv2d((content * visible).movedim(-1, 1)))
    flat = content.flatten(2)
    positions = torch.stack([image.flatten().nonzero().flatten() for image in visible])
    index = positions.unsqueeze(1).expand(-1, E, -1)
    decay = -mixer.A_logs.view(K, E, -1).exp()
    parameters = [mixer.x_proj_weight, mixer.dt_projs_weight, mixer.dt_projs_bias, decay, mixer.Ds.view(K, E)]
    y = packed_scan_loop(flat.gather(2, index), parameters, mixer.scan, positions, (H, W))
    y = torch.zeros_like(flat).scatter(2, index, y).view(B, E, H, W).movedim(1, -1)
    return mixer.out_proj(mixer.out_norm(y) * gate)


def features_by_definition(model: VMamba, images: Tensor, keep: Tensor) -> Tensor:
    x = run_zeroed(model.patch_embed, images, keep)
    for stage in model.layers:
        for block in stage.blocks:
            x = x + mixed_by_definition(block.op, block.norm(x), keep)
            if block.mlp is not None:
                x = x + block.mlp(block.norm2(x))
        joint = stage.downsample
        x = run_zeroed(joint, x, keep) if isinstance(joint, nn.Sequential) else joint(x)
    return model.classifier.norm(x).flatten(1, 2).gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@every_kind
def test_features_and_gradients_are_those_of_the_definition(options):
    model = small(**options).double()
    images, keep = torch.randn(2, 3, *SIZE, dtype=torch.float64), draw_positions(2, 3, 5, 6)
    ours, expected = model.forward_visible(images, keep), features_by_definition(model, images, keep)
    assert ours.shape == (2, 6, 32)
    torch.testing.assert_close(ours, expected)
    grad, parameters = torch.randn_like(ours), list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(y, parameters, grad) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@every_kind
def test_with_everything_visible_the_features_are_those_of_the_image(options):
    model, images = small(**options), torch.randn(2, 3, *SIZE)
    ours, expected = model.forward_visible(images, all_patches(2)), model.forward_features(images).flatten(1, 2)
    # float32 through three blocks of up to 240 steps
    assert (ours - expected).norm() / expected.norm() < 1e-5
    ours = model.double().forward_visible(images.double(), all_patches(2))
    torch.testing.assert_close(ours, model.forward_features(images.double()).flatten(1, 2), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("stages", "side"), [(1, 4), (2, 8), (4, 32)])
def test_a_patch_is_one_position_of_the_last_stage(stages, side):
    model = small(depths=(1,) * stages)
    assert model.patch_stride == side
    images = torch.randn(2, 3, 3 * side, 5 * side)
    features = model.forward_features(images)
    assert features.shape[1:3] == (3, 5)
    ours = model.forward_visible(images, all_patches(2))
    assert (ours - features.flatten(1, 2)).norm() / features.norm() < 1e-5


def test_a_pruned_encoder_has_smaller_patches():
    model = small()
    model.prune_intermediate_layers([1], prune_norm=True)
    assert model.patch_stride == 8
    assert model.forward_visible(torch.randn(1, 3, 8, 24), torch.tensor([[0, 2]])).shape == (1, 2, 16)


# Nothing leaks


@every_kind
@pytest.mark.parametrize("count", [1, 6, 14])
def test_hidden_pixels_change_no_bit_and_get_no_gradient(options, count):
    model, keep = small(**options), draw_positions(2, 3, 5, count)
    images, visible = torch.randn(2, 3, *SIZE), pixels_of(keep, SIZE, 16)
    grad, runs = torch.randn(2, count, 32), []
    for content in (images, torch.randn(2, 3, *SIZE), 1e30, torch.inf, torch.nan):
        leaf = torch.where(visible, images, content).requires_grad_()
        features = model.forward_visible(leaf, keep)
        dimages, *dparameters = torch.autograd.grad(features, [leaf, *model.parameters()], grad)
        runs.append([features, dimages, *dparameters])
        hidden, seen = dimages.masked_select(~visible), dimages.masked_select(visible)
        assert not hidden.any() and seen.any()
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@torch.no_grad()
@every_kind
def test_every_visible_patch_reaches_every_other(options):
    model, keep = small(**options).double(), draw_positions(1, 3, 5, 4)
    images = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    before = model.forward_visible(images, keep)
    for patch in keep[0].tolist():
        changed = images + pixels_of(torch.tensor([[patch]]), SIZE, 16)
        assert (model.forward_visible(changed, keep) != before).any(dim=-1).all()


@torch.no_grad()
def test_which_patches_of_another_image_are_visible_does_not_matter():
    model, images = small(), torch.randn(2, 3, *SIZE)
    first, second, other = draw_positions(3, 3, 5, 6).unsqueeze(1)
    answers = [model.forward_visible(images, torch.cat([first, rest])) for rest in (second, other)]
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][1], answers[1][1])


# Precision, memory and training


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_the_stream_is_float32_under_autocast_and_in_a_bfloat16_model(options):
    images, keep = torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6)
    model = VMamba(embed_dim=8, depths=(1, 1, 1), num_classes=0, **options)
    exact, streams = model.forward_visible(images, keep), []
    for block in [block for stage in model.layers for block in stage.blocks]:
        block.register_forward_hook(lambda module, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.forward_visible(images, keep)
    low = model.bfloat16().forward_visible(images.bfloat16(), keep)
    assert (mixed.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    # bfloat16 keeps 8 bits, 4e-3; a handful of roundings per branch add up to a few of these.
    for answer in (mixed, low.float()):
        assert (answer - exact).norm() / exact.norm() < 1.5e-2
    assert set(streams) == {torch.float32}


@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_gradients_under_autocast_are_float32_and_close(options):
    model = VMamba(embed_dim=8, depths=(1, 1, 1), num_classes=0, **options)
    images, keep, grad = torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6), torch.randn(2, 6, 32)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model.forward_visible(images, keep)
        gradients.append(torch.autograd.grad(features, list(model.parameters()), grad))
    exact, mixed = (torch.cat([g.flatten() for g in each]) for each in gradients)
    assert mixed.dtype == torch.float32
    # twice the roundings of the features
    assert (mixed - exact).norm() / exact.norm() < 3e-2


@torch.no_grad()
def test_every_packed_map_inside_is_contiguous_and_channel_last():
    model, seen = small(), []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.forward_visible(torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6))
    assert all(x.is_contiguous() and x.shape[:2] == (2, 1) for x in seen)
    assert [x.shape[2] // 6 for x in seen] == [64, 16, 16, 16, 16, 4, 4, 4, 4, 1, 1, 1, 1, 1]


def bytes_kept(model: VMamba, forward: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, other than parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_what_is_kept_for_the_backward_pass_falls_with_the_visible_share(options):
    model, images = small(embed_dim=32, **options), torch.randn(8, 3, 112, 112)
    whole = bytes_kept(model, model.forward_features, images)
    shares = []
    for count in (12, 24):
        keep = draw_positions(8, 7, 7, count)
        shares.append(bytes_kept(model, model.forward_visible, images, keep) / whole)
    # Beside its share, an image costs its pixels, and a block a copy of what is scanned for each order but the first.
    assert shares[0] < 1.35 * 12 / 49
    assert 1.75 < shares[1] / shares[0] < 2.05


def test_gradient_checkpointing_and_stochastic_depth_give_the_same_bits():
    model = small(depths=(1, 2, 1), drop_path_rate=0.3)
    images, keep, gradients, runs = torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6), [], []
    model.layers[1].blocks[0].mlp.register_forward_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        features = model.forward_visible(images, keep)
        gradients.append(torch.autograd.grad(features.square().sum(), list(model.parameters())))
    assert runs == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, V0], ids=["s1", "v0"])
def test_one_graph_captures_the_whole_model(options):
    model = small(depths=(1, 1), **options)
    images, keep = torch.randn(2, 3, 24, 40), draw_positions(2, 3, 5, 6)
    compiled = torch.compile(model.forward_visible, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model.forward_visible, compiled):
        features = run(images, keep)
        results.append([features, *torch.autograd.grad(features.square().mean(), list(model.parameters()))])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@torch.no_grad()
def test_a_registered_encoder_runs_on_visible_patches():
    model = timm.create_model("test_vmamba").eval()
    images, keep = torch.randn(2, 3, 96, 160), draw_positions(2, 3, 5, 4)
    assert model.forward_visible(images, keep).shape == (2, 4, 128)


# Errors


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((48, 72), r"patches of 16 x 16 pixels must fill .*; got 48 x 72 .* to 48 x 64\."),
        ((10, 23), r"got 10 x 23 \(height x width\). Resize or crop it, e.g. to 16 x 16\."),
    ],
)
def test_patches_that_do_not_fill_the_image_are_refused(size, message):
    with pytest.raises(ValueError, match=f"^VMamba: .*{message}"):
        small().forward_visible(torch.randn(1, 3, *size), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.arange(6), r"keep is int64 .* = \(2, 1 to 15\) on cpu; got torch.int64 \(6,\) on cpu"),
        (torch.zeros(3, 1).long(), r"got torch.int64 \(3, 1\)"),
        (torch.zeros(2, 0).long(), r"got torch.int64 \(2, 0\)"),
        (torch.zeros(2, 16).long(), r"got torch.int64 \(2, 16\)"),
        (torch.ones(2, 6).bool(), r"got torch.bool \(2, 6\)"),
        (torch.zeros(2, 1, device="meta").long(), r"got torch.int64 \(2, 1\) on meta"),
        (torch.tensor([[1, 2], [4, 3]]), r"patches 0 to 14 .* ascending order, each once; got \[4, 3\]. Sort it"),
        (torch.tensor([[1, 2], [4, 4]]), r"each once; got \[4, 4\]"),
        (torch.tensor([[-1, 2], [3, 4]]), r"got \[-1, 2\]"),
        (torch.tensor([[1, 2], [3, 15]]), r"got \[3, 15\]"),
    ],
    ids=str,
)
def test_a_wrong_choice_of_patches_is_named(keep, message):
    with pytest.raises(ValueError, match=f"^VMamba: .*{message}"):
        small().forward_visible(torch.randn(2, 3, *SIZE), keep)


def test_something_else_than_images_and_a_cascade_are_refused():
    keep = torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match=r"floating-point \(batch, 3, height, width\); got .*\(1, 1, 48, 80\)"):
        small().forward_visible(torch.randn(1, 1, *SIZE), keep)
    with pytest.raises(ValueError, match=r"'cascade' starts anew .* Use cross, unidirectional, bidirectional"):
        small(scan="cascade").forward_visible(torch.randn(1, 3, *SIZE), keep)
