"""The encoder VMamba2: sizes, timm's vocabulary, training, errors."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import ssmpretrain
from ssmpretrain.encoders.vmamba2 import VARIANTS, VMamba2

NUM_PARAMETERS = {"vmamba2_tiny": 16.81, "vmamba2_small": 26.04, "vmamba2_base": 45.77}  # millions
SMALL = {"embed_dim": 8, "depths": (1, 1), "d_state": 4, "head_dim": 4, "num_classes": 5}


def small(**options) -> VMamba2:
    torch.manual_seed(0)
    return VMamba2(**{**SMALL, **options})


def names_in(group: dict, model: VMamba2) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_every_registered_name_has_the_documented_number_of_parameters():
    assert VARIANTS.keys() - {"test_vmamba2"} == NUM_PARAMETERS.keys() == set(ssmpretrain.list_encoders("vmamba2_*"))
    for name, millions in NUM_PARAMETERS.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        assert f": {millions:.1f} M parameters" in getattr(ssmpretrain.encoders.vmamba2, name).__doc__


@pytest.mark.parametrize("scan", ["cross", "unidirectional", "bidirectional", ("h", "w2_flip")], ids=str)
@pytest.mark.parametrize("gate", [False, True])
def test_every_kind_trains_every_parameter(scan, gate):
    model = small(scan=scan, gate=gate)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_the_whole_is_its_parts():
    model = small().eval()
    images = torch.randn(2, 3, 32, 48)
    features = model.forward_features(images)
    assert features.shape == (2, 4, 6, 16)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    assert torch.equal(model(images), model.classifier.head(pooled))
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, features)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 12), (2, 16, 4, 6)]
    model.reset_classifier(3, "")
    assert model(images).shape == (2, 4, 6, 3)


@torch.no_grad()
def test_features_only_gives_maps_for_a_detector():
    model = timm.create_model("test_vmamba2", features_only=True, out_indices=(1, 3))
    maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16 * 2**i, 16 // 2**i, 24 // 2**i) for i in (1, 3)]
    assert model.feature_info.reduction() == [8, 32]


def test_the_configuration_tells_timm_where_the_parts_are():
    model = timm.create_model("test_vmamba2")
    modules = dict(model.named_modules())
    assert modules[model.pretrained_cfg["classifier"]] is model.get_classifier()
    assert isinstance(modules[model.pretrained_cfg["first_conv"]], nn.Conv2d)
    assert all(info["module"] in modules for info in model.feature_info)


def test_layer_decay_gives_each_block_its_own_rate():
    model = timm.create_model("test_vmamba2")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    rate_of = {name: group["lr_scale"] for group in groups for name in names_in(group, model)}
    assert len(rate_of) == len(list(model.parameters()))
    # the stem, five blocks, the head
    assert sorted(set(rate_of.values())) == [0.5**i for i in range(6, -1, -1)]
    assert rate_of["layers.3.blocks.0.op.dt_bias"] == 0.5


def test_weight_decay_spares_decays_skips_and_biases():
    model = small(conv_bias=True)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = set().union(*(names_in(group, model) for group in groups if group["weight_decay"]))
    kinds = {name.split(".op.")[-1] for name in decayed if ".op." in name}
    assert kinds == {"in_proj.weight", "dt_proj.weight", "conv2d.weight", "out_proj.weight"}


def test_gradient_checkpointing_gives_the_same_bits():
    model, images, gradients, runs = small(depths=(2, 2), drop_path_rate=0.2), torch.randn(2, 3, 32, 32), [], []
    model.layers[1].blocks[1].mlp.register_forward_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))
    assert runs == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_one_graph_captures_the_whole_model():
    model, images = small(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


def test_some_steps_lower_the_loss_on_a_fixed_batch():
    torch.manual_seed(0)
    model = small()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": (8,)}, r"embed_dim and depths name one number per stage; got \[8\] and \[1, 1\]"),
        ({"d_state": 0}, "d_state is at least 1; got 0"),
        ({"head_dim": 0}, "head_dim is at least 1; got 0"),
        ({"head_dim": 5}, "head_dim divides the inner channels of every stage; got 5 for 8"),
        ({"d_conv": 4}, "d_conv is odd, .*; got 4"),
        ({"ssm_ratio": 0.1}, r"ssm_ratio \* embed_dim is finite and at least 1; got 0.1 \* 8"),
        ({"mlp_ratio": -1}, "mlp_ratio is finite and at least 0; got -1"),
        ({"stem": "conv7"}, "stem is one of patch, conv; got 'conv7'"),
        ({"scan": "cascade"}, "scan is .* not 'cascade'"),
        ({"scan": "cros"}, "got 'cros'"),
        ({"drop_path_rate": 1}, r"drop_path_rate is in \[0, 1\); got 1"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=f"^VMamba2.*: .*{message}"):
        small(**options)
