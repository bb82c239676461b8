"""Encoders of other installed packages are found by an entry point."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from installed import install

import ssmpretrain
from ssmpretrain.encoders import family_registry

GROUP = "ssmpretrain.encoders"
MODULE = """
from typing import ClassVar
import timm
import torch
from ssmpretrain.encoders import Family, register_family

class Added(torch.nn.Module):
    def __init__(self, num_classes=10, **unused):
        super().__init__()
        self.num_features = 3
        self.head = torch.nn.Linear(3, num_classes) if num_classes else torch.nn.Identity()
        self.num_classes = num_classes

@timm.models.register_model
def added_encoder(pretrained=False, **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith("pretrained")}
    return Added(**kwargs)

class AddedFamily(Family):
    title = "Added"
    classes = (Added,)
    variants = {"added_encoder": {}}

register_family(AddedFamily())
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder on the path; what it adds is forgotten at the end."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(family_registry, "_registered", list(family_registry._registered))
    family_registry.import_added_families.cache_clear()
    yield tmp_path
    family_registry.import_added_families.cache_clear()


def test_an_entry_point_adds_encoders(site: Path, tmp_path: Path) -> None:
    install(site, "added_package", GROUP, "added_package = added_module")
    (site / "added_module.py").write_text(MODULE)
    assert "added_encoder" in ssmpretrain.list_encoders()
    assert ssmpretrain.create_encoder("added_encoder", num_classes=2).num_classes == 2


def test_a_package_that_cannot_be_imported_is_named(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "broken_package", GROUP, "broken_package = no_such_module")
    assert "test_vim" in ssmpretrain.list_encoders()
    assert "broken_package: its encoders are not available" in caplog.text and "no_such_module" in caplog.text


def test_a_checkpoint_of_an_encoder_that_nobody_registers_says_what_to_import(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    encoder = {"name": "nobodys_encoder", "args": {}}
    torch.save({"state_dict": {"encoder.head.weight": torch.zeros(2, 3)}, "encoder": encoder}, path)
    with pytest.raises(ValueError, match=r"nobodys_encoder, and no package registers that name\. Import"):
        ssmpretrain.load_encoder(path)


@pytest.mark.parametrize("name", [None, 3])
def test_a_name_is_a_text(name: object) -> None:
    with pytest.raises(ValueError, match="create_encoder: name is a text"):
        ssmpretrain.create_encoder(name)  # type: ignore[arg-type]


def test_a_family_is_registered_as_an_object(site: Path) -> None:
    with pytest.raises(ValueError, match="register_family: family is an object of a subclass of Family"):
        family_registry.register_family(family_registry.Family)  # type: ignore[arg-type]


def test_a_family_whose_looks_like_fails_is_named(site: Path, tmp_path: Path) -> None:
    class Broken(family_registry.Family):
        title = "Broken"

        def looks_like(self, state: object) -> bool:
            raise KeyError("gone")

    family_registry.register_family(Broken())
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"looks_like of the family Broken .*KeyError: 'gone'"):
        ssmpretrain.load_encoder(tmp_path / "weights.pth")


def test_arguments_of_another_kind_are_refused() -> None:
    for classes in ("x", 2.5, True):
        with pytest.raises(ValueError, match=rf"^create_encoder: num_classes is a whole number; got {classes!r}\. "):
            ssmpretrain.create_encoder("test_vim", num_classes=classes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^list_encoders: filter is a shell pattern; got 3\."):
        ssmpretrain.list_encoders(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^load_encoder: path is that of a file or folder; got None\."):
        ssmpretrain.load_encoder(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^load_encoder: .* got https://host/x\.pth\. Download it first\.$"):
        ssmpretrain.load_encoder("https://host/x.pth")
