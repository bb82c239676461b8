"""Modules are found by their former names."""

import importlib
import sys
import warnings

import pytest

from ssmpretrain._moved import NEW_NAMES


def test_a_former_name_gives_the_present_module_and_says_so() -> None:
    for old, new in NEW_NAMES.items():
        sys.modules.pop(old, None)
        present = importlib.import_module(new)
        spec = present.__spec__
        with pytest.warns(FutureWarning, match=f"{old} is called {new} now"):
            assert importlib.import_module(old) is present
        assert present.__name__ == new and present.__spec__ is spec


def test_a_name_that_never_was_is_not_found() -> None:
    with warnings.catch_warnings(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("ssmpretrain.training.never")


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("encoders.vim", "Vim vim_tiny_patch16_224 test_vim VARIANTS PYRAMIDS default_cfgs MIXER"),
        ("encoders.arm", "ARMEncoder ARMBlock ARMMixer SwiGLU arm_base_patch16_224 VARIANTS PYRAMIDS"),
        ("encoders.vmamba", "VMamba Classifier GLOBAL_POOLS vmamba_tiny_s1l8 VARIANTS default_cfgs"),
        ("training.ranks", "rank world gather broadcast_rows gather_rows in_order take_first alone joined_ranks"),
        ("training.checkpoints", "Checkpoints CheckpointNotSaved is_over"),
        ("datamodules.remote", "RemoteFile Server Fault Patience BRIEF PATIENT persist compare"),
    ],
)
def test_a_module_that_became_a_folder_keeps_its_names(package: str, names: str) -> None:
    module = importlib.import_module(f"ssmpretrain.{package}")
    assert not [name for name in names.split() if not hasattr(module, name)]
    assert not hasattr(module, "never")
