"""The head of DINO: its arithmetic, its last layer, its names."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.joint_embedding.head import DINOHead, LastLayer

SIZES = (6, 16, 12, 5)  # width, prototypes, hidden, bottleneck


def head(last_layer: LastLayer = "unit", patch: DINOHead | None = None) -> DINOHead:
    torch.manual_seed(0)
    width, prototypes, hidden, bottleneck = SIZES
    return DINOHead(width, prototypes, hidden, bottleneck, last_layer, patch)


def features() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["unit", "scaled", "plain"])
def test_logits_are_those_of_torch_s_own_layers(kind: LastLayer) -> None:
    ours = head(kind)
    if ours.last_layer.scale is not None:
        nn.init.normal_(ours.last_layer.scale)
    x = ours.mlp(features())
    x = x / x.norm(dim=-1, keepdim=True)
    layer = nn.Linear(5, 16, bias=False)
    if kind == "plain":
        layer.load_state_dict({"weight": ours.last_layer.weight})
    else:  # what the published code uses
        nn.utils.parametrizations.weight_norm(layer)
        scale = torch.ones(16, 1) if ours.last_layer.scale is None else ours.last_layer.scale
        weights = layer.parametrizations.weight
        weights.original0.data, weights.original1.data = scale.data, ours.last_layer.weight.data
    assert torch.allclose(ours(features()), layer(x), atol=1e-6)


def test_fresh_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    big = DINOHead(384, 1000)
    assert [tuple(big.mlp[i].weight.shape) for i in (0, 2, 4)] == [(2048, 384), (2048, 2048), (256, 2048)]
    for layer in big.mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    assert sum(p.numel() for p in big.parameters()) == 2049 * 2048 + 385 * 2048 + 2049 * 256 + 256 * 1000


def test_logits_are_float32_under_autocast() -> None:
    ours, x = head(), features()
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(x)
    assert logits.dtype == torch.float32
    projected = ours.project(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.last_layer(projected), ours.last_layer(projected.float()))
        exact = ours.last_layer(projected)
    assert torch.equal(exact, ours.last_layer(projected))


def test_a_feature_of_zeros_has_finite_logits_and_gradients() -> None:
    ours = head()
    x = torch.zeros(2, 6, requires_grad=True)
    for layer in ours.mlp[::2]:
        nn.init.zeros_(layer.bias)
    ours(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_state_names_are_stable_and_a_copy_and_a_checkpoint_hold_all(tmp_path: Path) -> None:
    mlp = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    both = head("scaled", head("plain"))
    assert list(head().state_dict()) == [*mlp, "last_layer.weight"]
    assert set(both.state_dict()) == {
        *mlp, "last_layer.weight", "last_layer.scale", *(f"patch.{name}" for name in (*mlp, "last_layer.weight")),
    }  # fmt: skip
    copied = copy.deepcopy(both)
    assert torch.equal(copied(features()), both(features())) and copied.last_layer.weight is not both.last_layer.weight
    torch.save(both.state_dict(), tmp_path / "head.pt")
    other = head("scaled", head("plain"))
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other.of_patches(features()), both.of_patches(features()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"last_layer": "norm"}, "last_layer is unit, scaled or plain; got 'norm'"),
    ({"num_prototypes": 1}, "num_prototypes is at least 2; got 1"),
    ({"bottleneck_dim": 0}, "bottleneck_dim is at least 1; got 0"),
])  # fmt: skip
def test_sizes_that_make_no_head_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DINOHead(6, **changes)  # type: ignore[arg-type]
