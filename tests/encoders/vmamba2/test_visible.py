"""VMamba2 on visible patches alone."""

import pytest
import torch
from packed_scans import draw_positions
from torch import Tensor, nn
from vmamba2_loop import features_by_loop

from ssmpretrain.encoders.vmamba2 import VMamba2

SIZE = (24, 40)  # 3 x 5 patches of 8 pixels for two stages
KINDS = {
    "plain": {},
    "gated": {"gate": True, "conv_bias": True},
    "routes": {"scan": ("v_flip", "h", "w2")},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def small(**options) -> VMamba2:
    """One block in each of two stages, and parameters that make every branch count."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (1, 1), "d_state": 4, "head_dim": 4, "num_classes": 0}
    model = VMamba2(**{**sizes, **options})
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "conv2d.weight", "bias")):
            nn.init.normal_(parameter, std=0.3)
    return model


def shown(keep: Tensor) -> Tensor:
    """Whether each of 3 x 5 patches is visible, (B, 3, 5)."""
    return torch.zeros(len(keep), 15, dtype=torch.bool).scatter(1, keep, True).view(-1, 3, 5)


def pixels(keep: Tensor) -> Tensor:
    return shown(keep).repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)


@every_kind
def test_features_and_gradients_are_those_of_the_definition(options):
    model = small(**options).double()
    images, keep = torch.randn(2, 3, *SIZE, dtype=torch.float64), draw_positions(2, 3, 5, 6)
    grad, parameters, results = torch.randn(2, 6, 16, dtype=torch.float64), list(model.parameters()), []
    for features in (model.forward_visible(images, keep), features_by_loop(model, images, shown(keep))):
        results.append([features, *torch.autograd.grad(features, parameters, grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@every_kind
def test_with_everything_visible_the_features_are_those_of_the_image(options):
    model, images, keep = small(**options), torch.randn(2, 3, *SIZE), torch.arange(15).expand(2, -1)
    ours, expected = model.forward_visible(images, keep), model.forward_features(images).flatten(1, 2)
    # float32 through two blocks of up to 60 steps
    assert (ours - expected).norm() / expected.norm() < 1e-5


@every_kind
@pytest.mark.parametrize("count", [1, 6, 14])
def test_hidden_pixels_change_no_bit_and_get_no_gradient(options, count):
    model, keep = small(**options), draw_positions(2, 3, 5, count)
    images, visible = torch.randn(2, 3, *SIZE), pixels(keep)
    grad, runs = torch.randn(2, count, 16), []
    for content in (images, torch.randn(2, 3, *SIZE), torch.inf, torch.nan):
        leaf = torch.where(visible, images, content).requires_grad_()
        features = model.forward_visible(leaf, keep)
        dimages, *dparameters = torch.autograd.grad(features, [leaf, *model.parameters()], grad)
        runs.append([features, dimages, *dparameters])
        assert not dimages.masked_select(~visible).any() and dimages.masked_select(visible).any()
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@torch.no_grad()
def test_every_visible_patch_reaches_every_other():
    model, keep = small().double(), draw_positions(1, 3, 5, 4)
    images = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    before = model.forward_visible(images, keep)
    for patch in keep[0].tolist():
        changed = images + pixels(torch.tensor([[patch]]))
        assert (model.forward_visible(changed, keep) != before).any(dim=-1).all()


def test_under_autocast_the_stream_is_float32_and_gradients_are_close():
    torch.manual_seed(0)
    model = VMamba2(embed_dim=8, depths=(1, 1), d_state=4, head_dim=4, num_classes=0)
    gradients, streams = [], []
    for stage in model.layers:
        stage.blocks[0].register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    images, keep, grad = torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6), torch.randn(2, 6, 16)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model.forward_visible(images, keep)
        gradients.append(torch.autograd.grad(features, list(model.parameters()), grad))
    exact, mixed = (torch.cat([g.flatten() for g in each]) for each in gradients)
    assert mixed.dtype == torch.float32 and set(streams) == {torch.float32}
    # bfloat16 keeps 8 bits, 4e-3; a dozen roundings forward and backward add up to some of these.
    assert (mixed - exact).norm() / exact.norm() < 3e-2


def test_gradient_checkpointing_and_stochastic_depth_give_the_same_bits():
    model = small(depths=(1, 2), drop_path_rate=0.3)
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
def test_one_graph_captures_the_whole_model():
    model = small()
    images, keep = torch.randn(2, 3, *SIZE), draw_positions(2, 3, 5, 6)
    compiled = torch.compile(model.forward_visible, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model.forward_visible, compiled):
        features = run(images, keep)
        results.append([features, *torch.autograd.grad(features.square().mean(), list(model.parameters()))])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


def test_messages_name_this_encoder():
    for keep, message in (
        (torch.arange(6), r"keep is int64 .* = \(2, 1 to 15\) on cpu; got torch.int64 \(6,\) on cpu"),
        (torch.tensor([[1, 2], [4, 3]]), r"ascending order, each once; got \[4, 3\]. Sort it"),
    ):
        with pytest.raises(ValueError, match=f"^VMamba2: .*{message}"):
            small().forward_visible(torch.randn(2, 3, *SIZE), keep)
    with pytest.raises(ValueError, match=r"^VMamba2: patches of 8 x 8 pixels must fill an image"):
        small().forward_visible(torch.randn(1, 3, 20, 40), torch.zeros(1, 1, dtype=torch.int64))
