"""Adapters, quantisation, pruning and hooks on the modules of an encoder act, though its fused passes skip modules."""

import copy
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.utils import prune

import ssmpretrain
from ssmpretrain.encoders.layers.plain_modules import is_called_plainly, is_plain
from ssmpretrain.encoders.masking.visible_map import VisibleMap
from ssmpretrain.encoders.vmamba.blocks import StreamConv2d

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("test_vim", {}),
    ("test_vim", {"bidirectional": "ssm"}),
    ("test_vim", {"bidirectional": "none"}),
    ("test_vmamba", {}),
    ("test_arm", {}),
    ("test_vim2", {}),
    ("test_vim2", {"bidirectional": "separate", "mlp_ratio": 0}),
]
# What adapters are put on, by the part of the name before the direction.
TARGETS = ("in_proj", "x_proj", "dt_proj", "conv1d", "conv2d", "out_proj", "norm")


class Adapter(nn.Module):
    """In place of a module, like LoRA's: no weight of its own name, nothing added at first."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.base(*inputs) * (1 + self.scale)


class Quantised(nn.Module):
    """In place of a linear layer, like torch.ao's: int8 in a buffer, and `weight` and `bias` are methods."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.scale, self.own_bias = scale, linear.bias

    def weight(self) -> Tensor:
        return self.packed * self.scale

    def bias(self) -> Tensor | None:
        return self.own_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight(), self.bias())


@pytest.fixture(params=FORMS, ids=lambda form: "-".join([form[0], *map(str, form[1].values())]))
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = request.param
    return ssmpretrain.create_encoder(name, num_classes=3, **arguments)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def targets(encoder: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The modules of the blocks to adapt: (parent, name, module)."""
    return [
        (parent, name, module)
        for path, parent in encoder.named_modules()
        for name, module in parent.named_children()
        if path.startswith("layers.") and name.removesuffix("_b").removesuffix("_c") in TARGETS
    ]


def test_every_adapter_gets_a_gradient_and_an_idle_one_changes_nothing(encoder: nn.Module, images: Tensor) -> None:
    expected = encoder(images)
    for parent, name, module in targets(encoder):
        setattr(parent, name, Adapter(module))
    logits = encoder(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.logsumexp(1).sum().backward()
    scales = {name: p.grad for name, p in encoder.named_parameters() if name.endswith(".scale")}
    assert len(scales) >= 8
    assert [name for name, grad in scales.items() if grad is None or not grad.any()] == []


def test_an_adapter_under_autocast_rounds_no_more_than_autocast_does(encoder: nn.Module, images: Tensor) -> None:
    adapted = copy.deepcopy(encoder)
    for parent, name, module in targets(adapted):
        setattr(parent, name, Adapter(module))
    exact = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, called = encoder(images), adapted(images)
    error, limit = ((logits - exact).norm() / exact.norm() for logits in (called, fused))
    assert error < 2 * limit + 0.01


def test_hooks_are_called_on_every_module(encoder: nn.Module, images: Tensor) -> None:
    expected, called = encoder(images), set()
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)
    # lists are never called, and forward_head runs the parts of a classifier
    lists = {n for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList) or hasattr(m, "downsample")}
    assert {name for name, _ in encoder.named_modules()} - called - lists <= {"classifier"}


def test_a_hook_on_the_mixer_may_change_its_output(images: Tensor) -> None:
    encoder = ssmpretrain.create_encoder("test_vim", num_classes=3)
    before = encoder(images)
    encoder.layers[0].mixer.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not torch.allclose(encoder(images), before)


def test_pruned_weights_count(encoder: nn.Module, images: Tensor) -> None:
    linear = [module for _, _, module in targets(encoder) if isinstance(module, nn.Linear)]
    for module in linear:
        prune.random_unstructured(module, "weight", 0.5)
    pruned = encoder(images)
    for module in linear:
        prune.remove(module, "weight")
    torch.testing.assert_close(pruned, encoder(images), rtol=1e-5, atol=1e-5)


def test_a_quantised_linear_layer_is_called(encoder: nn.Module, images: Tensor) -> None:
    exact = encoder(images)
    for parent, name, module in targets(encoder):
        if isinstance(module, nn.Linear):
            setattr(parent, name, Quantised(module))
    assert 0 < (encoder(images) - exact).norm() / exact.norm() < 0.2  # 8 bits of every weight


def test_an_adapter_on_a_convolution_of_visible_positions_gets_a_gradient() -> None:
    here = VisibleMap(torch.tensor([[0, 2, 3], [1, 2, 3]]), (2, 2), 2)
    conv, x = StreamConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 1, 12)
    expected = here.convolve(conv, x, here)
    adapted = Adapter(conv)
    y = here.convolve(adapted, x, here)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert adapted.scale.grad.any()


def test_timms_muon_leaves_decays_and_step_sizes_to_adamw() -> None:
    """As docs/kernels.md advises; a decay is a table of rates, which to orthogonalise has no meaning."""
    for name in ("vim_tiny_patch16_224", "vmamba_tiny_v0", "test_arm"):
        with torch.device("meta"):
            encoder = timm.create_model(name)
        names = {parameter: name for name, parameter in encoder.named_parameters()}
        optimizer = create_optimizer_v2(encoder, "muon", lr=0.1, fallback_no_weight_decay=True)
        left = {names[p] for group in optimizer.param_groups if not group.get("use_fallback") for p in group["params"]}
        assert any(name.endswith("in_proj.weight") for name in left)
        assert [name for name in left if re.search(r"A_?\w*_log|dt_projs_bias|pos_embed|cls_token", name)] == []


def test_what_is_plain() -> None:
    linear = nn.Linear(2, 3)
    assert is_plain(linear, nn.Linear, bias=True) and is_plain(StreamConv2d(1, 1, 1), nn.Conv2d, bias=True)
    assert not is_plain(linear, nn.Linear)  # the bias would be left out
    assert not is_plain(Adapter(linear), nn.Linear, bias=True)
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear, bias=True)

    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(linear, f"register_{register}")(lambda *_: None)
        assert not is_called_plainly(linear, nn.Linear), register
        handle.remove()
    assert is_called_plainly(linear, nn.Linear)
    linear.forward = lambda x: x  # as offloading does
    assert not is_called_plainly(linear, nn.Linear)
