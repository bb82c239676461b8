"""Families of other packages: entry points of the group `ssmpretrain.encoders`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.models import _registry as timm_registry

from ssmpretrain.encoders import create_encoder, family_registry, list_encoders, load_encoder, register_family
from ssmpretrain.encoders.family import Family
from ssmpretrain.encoders.family_registry import _registered as registered

MODULE = """
from timm.models import register_model
from torch import nn
from ssmpretrain.encoders.family import Family
from ssmpretrain.encoders.family_registry import register_family

class Added(nn.Module):
    def __init__(self, num_classes=0, **kwargs):
        super().__init__()
        self.added = nn.Linear(2, 2)

@register_model
def added_net(pretrained=False, **kwargs):
    return Added()

class AddedFamily(Family):
    title, names_like, classes, variants = "Added", ("added_*",), (Added,), {"added_net": {}}

register_family(AddedFamily())
"""


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(family_registry, "_have_looked", False)
    before = list(registered)
    yield
    registered[:] = before
    sys.modules.pop("added_by_test", None)
    for names in (timm_registry._model_entrypoints, timm_registry._model_to_module):
        names.pop("added_net", None)  # type: ignore[attr-defined]


def install(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a package out as pip installs it."""
    about = folder / "added_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: added-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssmpretrain.encoders]\nadded = added_by_test\n")
    (folder / "added_by_test.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))


def test_a_name_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, MODULE, monkeypatch)
    create_encoder("test_vim", num_classes=0)
    assert "added_by_test" not in sys.modules  # nobody needed it
    assert type(create_encoder("added_net")).__name__ == "Added"
    assert "added_net" in list_encoders()


def test_a_package_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "raise RuntimeError('no luck')", monkeypatch)
    with (
        pytest.warns(UserWarning, match=r"package added-package .*RuntimeError: no luck"),
        pytest.raises(ValueError, match=r"^create_encoder: name is a registered encoder; got 'added_net'\."),
    ):
        create_encoder("added_net")


def test_a_checkpoint_of_an_unknown_encoder_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {"added.weight": torch.ones(2, 2)}, "encoder": {"name": "clsnet_s", "args": {}}}, path)
    with pytest.raises(ValueError, match=r"its encoder is clsnet_s, and no such .* group ssmpretrain\.encoders\.$"):
        load_encoder(path)


def test_what_is_no_name_no_path_and_no_family_is_refused() -> None:
    for name in (None, 3):
        with pytest.raises(ValueError, match=rf"^create_encoder: name is a registered encoder; got {name}\. Give"):
            create_encoder(name)  # type: ignore[arg-type]
    for classes in ("x", 2.5, True):
        with pytest.raises(ValueError, match=rf"^create_encoder: num_classes is a whole number; got {classes!r}\. "):
            create_encoder("test_vim", num_classes=classes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^list_encoders: filter is a shell pattern; got 3\."):
        list_encoders(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^load_encoder: path is that of a file or folder; got None\."):
        load_encoder(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^load_encoder: .* got https://host/x\.pth\. Download it first\.$"):
        load_encoder("https://host/x.pth")
    with pytest.raises(ValueError, match=r"^register_family: .* got the class Family\. Give an instance"):
        register_family(Family)  # type: ignore[arg-type]


def test_a_family_whose_looks_like_fails_is_named(tmp_path: Path) -> None:
    class Broken(Family):
        title = "Broken"

        def looks_like(self, state: object) -> bool:
            raise KeyError("gone")

    register_family(Broken())
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"looks_like of the family Broken .*KeyError: 'gone'"):
        load_encoder(tmp_path / "weights.pth")
