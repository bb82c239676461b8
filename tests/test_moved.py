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
