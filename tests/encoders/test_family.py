"""A family from outside the package: one file, no other edit, and it is built, loaded, masked and exported."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch

import ssmpretrain
from ssmpretrain.encoders.family import Family
from ssmpretrain.encoders.family_registry import UNKNOWN, choices, families, family_named, family_of, register_family
from ssmpretrain.encoders.family_registry import _registered as registered
from ssmpretrain.encoders.features import TappedEncoder
from ssmpretrain.objectives import MAE, SimMIM

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_encoder.py"
NAME = "tiny_scan_patch16_224"


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("custom_encoder", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_encoder"] = module
    before = families()
    spec.loader.exec_module(module)
    yield module
    registered[:] = before
    del sys.modules["custom_encoder"]


@pytest.fixture
def encoder(example: Any) -> Any:
    torch.manual_seed(0)
    return ssmpretrain.create_encoder(NAME, num_classes=3, depth=2)


def same(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_its_names_are_known(example: Any) -> None:
    assert NAME in ssmpretrain.list_encoders("tiny_*") and NAME in timm.list_models(module="custom_encoder")
    assert type(timm.create_model(NAME)) is type(ssmpretrain.create_encoder(NAME)) is example.TinyScan
    assert family_named(NAME) is family_of(ssmpretrain.create_encoder(NAME)) is example.FAMILY
    with pytest.raises(ValueError, match=r"takes no argument 'dept'\. Did you mean 'depth'"):
        ssmpretrain.create_encoder(NAME, dept=2)


def test_its_maps_serve_dense_tasks(encoder: Any) -> None:
    tapped = TappedEncoder(encoder)
    images = torch.randn(1, 3, 50, 70)
    maps = tapped(images)
    expected = encoder.forward_intermediates(torch.nn.functional.pad(images, (0, 10, 0, 14)), intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert not encoder.head.weight.requires_grad and encoder.blocks[1].A_log.requires_grad


def test_a_feature_info_that_contradicts_the_maps_is_refused(encoder: Any) -> None:
    encoder.feature_info = [{**info, "num_chs": 7} for info in encoder.feature_info]
    with pytest.raises(ValueError, match=r"64 x 96 pixels \[\(7, 4, 6\), .*got \[\(64, 4, 6\).* Correct feature_info"):
        TappedEncoder(encoder)


def test_bare_tensors_are_recognised(encoder: Any, tmp_path: Path) -> None:
    torch.save({"model": encoder.state_dict()}, tmp_path / "bare.pth")
    loaded: Any = ssmpretrain.load_encoder(tmp_path / "bare.pth", depth=2)
    assert same(loaded, encoder) and loaded.load_report.encoder == NAME
    with pytest.raises(ValueError, match=rf"holds 2 blocks of 64 channels; {NAME} has 4"):
        ssmpretrain.load_encoder(tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"with depth=2; .* with depth=4 was asked for"):
        ssmpretrain.load_encoder(tmp_path / "bare.pth", NAME)


@pytest.mark.parametrize(("format", "path"), [("safetensors", "x.safetensors"), ("timm", "x"), ("official", "x.pth")])
def test_an_export_comes_back(encoder: Any, tmp_path: Path, format: Any, path: str) -> None:
    ssmpretrain.save_encoder(encoder, tmp_path / path, format)
    loaded: Any = ssmpretrain.load_encoder(tmp_path / path)
    assert same(loaded, encoder) and loaded.num_classes == 3
    if format == "official":
        bare = torch.load(tmp_path / path, weights_only=True)["model"]
        torch.save(bare, tmp_path / "bare.pth")
        assert "stem.weight" in bare and same(ssmpretrain.load_encoder(tmp_path / "bare.pth", depth=2), encoder)
    if format == "timm":
        assert same(timm.create_model(f"local-dir:{tmp_path / path}", pretrained=True), encoder)


@pytest.mark.parametrize("objective", [MAE, SimMIM])
def test_it_is_pretrained_with_masks(example: Any, objective: Any) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1} if objective is MAE else {}
    model = objective(NAME, {"depth": 1}, mask_ratio=0.5, mask_unit=None, **decoder)
    images = torch.randn(4, 3, 64, 64)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model.loss(images, model.reconstruct(images, torch.Generator().manual_seed(0)))
        losses.append(loss.item())
        step.zero_grad()
        loss.backward()
        step.step()
    assert losses[1] < losses[0] and example.FAMILY.patch_side(model.encoder) == 16


def test_the_program_pretrains_exports_and_loads(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert "32 of 32 tensors loaded" in capsys.readouterr().out


def test_hidden_patches_do_not_matter(example: Any, encoder: Any) -> None:
    images, keep = torch.randn(1, 3, 32, 32), torch.tensor([[0, 3]])
    changed = images.clone()
    changed[:, :, :16, 16:] += 1  # patch 1 of the 2 x 2
    family = example.FAMILY
    assert torch.equal(family.pool_visible(encoder, images, keep), family.pool_visible(encoder, changed, keep))
    seen = family.forward_visible(encoder, images, keep)
    class_token, patches = family.class_and_patches(encoder, seen)
    assert class_token is None and torch.equal(patches, encoder.forward_tokens(encoder.embed(images)[:, [0, 3]]))


def test_messages_offer_it(example: Any) -> None:
    assert "TinyScan (tiny_scan_*)" in choices(lambda family: family.hides_patches)


def test_a_name_belongs_to_one_family(example: Any) -> None:
    class Other(Family):
        title: ClassVar[str] = "Other"
        variants: ClassVar[dict[str, dict[str, Any]]] = {"test_vim": {}}

    before = families()
    with pytest.raises(ValueError, match=r"test_vim of Other belong to Vim\. Choose other names"):
        register_family(Other())
    assert families() == before
    register_family(example.TinyScanFamily())  # anew, as in a notebook
    assert len(families()) == len(before)
    register_family(example.FAMILY)


def test_timms_own_encoders_have_a_family_or_none() -> None:
    assert family_of(ssmpretrain.create_encoder("test_vit")).title == "ViT and DeiT"
    assert family_of(ssmpretrain.create_encoder("test_resnet")) is UNKNOWN
    assert not any(name.startswith("vit") for family in families() for name in family.names)


@pytest.mark.parametrize(
    "family", [family for family in families() if family.variants], ids=lambda family: family.title
)
def test_families_tell_their_own_tensors_from_the_others(family: Family) -> None:
    smallest = next(name for name in family.variants if name.startswith("test_"))
    state = ssmpretrain.create_encoder(smallest).state_dict()
    assert [one for one in families() if one.looks_like(state)] == [family]
    found = family.recognise(state)
    assert found is not None and family.variant_name(found) == smallest and smallest in family.describe(found)
