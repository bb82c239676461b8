"""Errors that a person can repair: classes, exit codes, and errors from workers."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import ssmpretrain
from ssmpretrain.base import errors
from ssmpretrain.base.errors import DataError, PathMissing, SourceError, UserError

ROOT = Path(ssmpretrain.__file__).parents[1]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)]
# Modules whose plain errors are caught beside the place where they are raised, and put into words there.
CAUGHT_NEARBY = {"detection_records.py", "image_header.py", "reading.py", "run_lengths.py", "text_weights.py"}


class Refusing(Dataset[torch.Tensor]):
    """Data set whose samples cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling_and_is_a_value_error(kind: type[UserError]) -> None:
    error = pickle.loads(pickle.dumps(kind("x: holds 1; got 2. Give 1.")))
    assert type(error) is kind and str(error) == "x: holds 1; got 2. Give 1."
    assert isinstance(error, ValueError) and error.exit_code == 2 and not error.is_told


@pytest.mark.parametrize("kind", (UserError, DataError, SourceError, PathMissing))
def test_of_an_error_in_a_worker_the_message_alone_is_kept(kind: type[UserError]) -> None:
    message = "data: UserError: is a word like others\nin two lines. Correct it."
    with pytest.raises(kind) as raised:
        next(iter(DataLoader(Refusing(kind(message)), num_workers=1, multiprocessing_context="fork")))
    assert type(raised.value) is kind and str(raised.value) == message


def test_a_missing_path_is_found_by_its_class_of_python_too() -> None:
    assert issubclass(PathMissing, FileNotFoundError) and PathMissing("a").filename is None


def test_the_errors_come_without_torch() -> None:
    code = "import sys, ssmpretrain.base.errors; assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_no_room_raises_a_plain_error_for_people() -> None:
    files = [path for room in ("kernels", "datamodules", "ssmpretrain") for path in (ROOT / room).rglob("*.py")]
    raised = [
        f"{path}:{node.lineno}"
        for path in files
        if path.name not in CAUGHT_NEARBY
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ValueError", "TypeError")
    ]
    assert len(files) > 200 and not raised
