"""Triton's kernels without a GPU: their tests, in processes that start with TRITON_INTERPRET=1.

Only a GPU can show that results are the same bits on every run: the interpreter runs one program after the other.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """All files, as many at a time as there are cores: an interpreter uses one."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU: pytest -m gpu")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_pass_in_the_interpreter(
    file: Path, processes: dict[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = processes[file].result()
    print(done.stdout[-8000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_there_are_kernel_tests() -> None:
    assert FILES
