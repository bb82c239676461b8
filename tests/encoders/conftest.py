import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def formula() -> ModuleType:
    """The module of the golden files' weights and images."""
    spec = importlib.util.spec_from_file_location("golden_formula", GOLDENS / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
