"""The public names of the training room, by their short paths."""

import subprocess
import sys
from importlib import import_module

import pytest

from ssmpretrain import training


@pytest.mark.parametrize("room", ["checkpoints", "optim", "ranks", "stopping"])
def test_every_name_of_a_folder_is_a_name_of_the_room(room: str) -> None:
    folder = import_module(f"ssmpretrain.training.{room}")
    for name in folder.__all__:
        assert name in training.__all__ and name in dir(folder)
        assert getattr(folder, name) is getattr(training, name)
    with pytest.raises(AttributeError, match=f"module 'ssmpretrain.training.{room}' has no attribute 'Nothing'"):
        _ = folder.Nothing


def test_importing_the_room_imports_neither_torch_nor_lightning() -> None:
    script = "import sys, ssmpretrain.training.ranks; print({'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
