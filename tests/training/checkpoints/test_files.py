"""Checkpoint files: complete or absent, verified when read, never executed."""

import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import torch_io

from ssmpretrain.encoders.weights.content import part_of
from ssmpretrain.encoders.weights.on_disk import part_path, sidecar
from ssmpretrain.training.checkpoints import folder as checkpoint_folder
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.checkpoints.folder import (
    all_newest_first,
    by_step,
    inspect,
    keep_newest,
    name_of,
    point_last,
    sweep,
)


def content(value: float = 1.0) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((1000,), value)}, "global_step": int(value)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / name_of(7)
    CheckpointFiles().save_checkpoint(content(), path)
    return path


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process end at 2000 bytes, as on a disk that fills up."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_comes_with_the_checksum_that_sha256sum_checks(saved: Path) -> None:
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name, saved.name + ".sha256"]
    assert hashlib.sha256(saved.read_bytes()).hexdigest() in sidecar(saved).read_text()
    subprocess.run(["sha256sum", "--strict", "-c", sidecar(saved).name], cwd=saved.parent, check=True)
    assert torch.equal(torch.load(saved, weights_only=True)["state_dict"]["w"], torch.ones(1000))
    assert inspect(saved).damage is None


def test_every_truncation_and_every_flipped_bit_is_found(saved: Path) -> None:
    whole, draw = saved.read_bytes(), random.Random(0)
    for _ in range(100):
        cut = draw.randrange(len(whole))
        saved.write_bytes(whole[:cut])
        assert inspect(saved).damage == f"short: {cut:,} of {len(whole):,} bytes"
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        saved.write_bytes(flipped)
        assert "checksum" in str(inspect(saved).damage)
    saved.write_bytes(whole + b"\0")
    assert str(inspect(saved).damage).startswith("long")
    saved.write_bytes(whole)
    assert inspect(saved).damage is None


def test_without_a_checksum_or_with_half_of_one_the_file_itself_is_read(saved: Path) -> None:
    whole, beside, draw = saved.read_bytes(), sidecar(saved).read_bytes(), random.Random(0)
    for part in (b"", beside[:40], b"\xff" * 90):
        sidecar(saved).write_bytes(part)
        assert inspect(saved).damage is None
    sidecar(saved).unlink()
    assert inspect(saved).damage is None
    for _ in range(50):
        saved.write_bytes(whole[: draw.randrange(len(whole))])
        assert inspect(saved).damage is not None
    saved.write_bytes(b"<!DOCTYPE html>")
    assert "no checkpoint" in str(inspect(saved).damage)


def test_a_damaged_file_is_not_loaded(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step-000000007.ckpt is damaged \(short"):
        CheckpointFiles().load_checkpoint(saved)


class Shell:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_code_in_a_checkpoint_is_never_run(
    tmp_path: Path, weights_only: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Shell()}, "bad.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        CheckpointFiles().load_checkpoint("bad.ckpt", weights_only=weights_only)
    monkeypatch.setattr(torch_io, "get_filesystem", lambda url: SimpleNamespace(exists=lambda url: True))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **given: given)
    assert CheckpointFiles().load_checkpoint("http://x/y.ckpt", weights_only=weights_only)["weights_only"] is True
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_no_part_and_touches_nothing(saved: Path, small_files: None) -> None:
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    for path in (saved, saved.with_name(name_of(8))):
        with pytest.raises(OSError) as caught:
            CheckpointFiles().save_checkpoint(content(2.0), path)
        assert caught.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


@pytest.mark.parametrize("killed_at", ["fsync", "replace", "unlink"])
def test_killed_while_it_replaces_a_file_it_leaves_a_good_one(
    saved: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the writer at each system call in turn: the path then holds the old file or the new one."""
    owner: Any = os if killed_at == "fsync" else Path
    real, left = getattr(owner, killed_at), 0

    def die(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*args, **kwargs)

    for calls in range(4):
        left, child = calls, os.fork()
        if child == 0:
            monkeypatch.setattr(owner, killed_at, die)
            CheckpointFiles().save_checkpoint(content(2.0 + calls), saved)
            os._exit(0)
        os.waitpid(child, 0)
        assert inspect(saved).damage is None
        sweep(saved.parent)
        assert {path.name for path in saved.parent.iterdir()} <= {saved.name, sidecar(saved).name}


def test_in_a_thread_the_tensors_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    files, state, path = CheckpointFiles(async_save=True), content(), tmp_path / name_of(1)
    done: list[bool] = []
    files.save_checkpoint(state, path)
    files.after_writing(lambda: done.append(path.exists()))
    state["state_dict"]["w"].zero_()
    files.join()
    assert torch.load(path, weights_only=True)["state_dict"]["w"].sum() == 1000 and done == [True]


def test_an_error_in_the_thread_is_raised_at_the_next_occasion_and_once(tmp_path: Path, small_files: None) -> None:
    files, done = CheckpointFiles(async_save=True), []
    files.save_checkpoint(content(), tmp_path / name_of(1))
    files.after_writing(lambda: done.append(1))
    with pytest.raises(OSError):
        files.join()
    files.join()
    assert not done and not list(tmp_path.iterdir())


def test_an_error_in_the_thread_is_not_lost_at_the_end_and_hides_no_other(
    tmp_path: Path, small_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    files = CheckpointFiles(async_save=True)
    files.save_checkpoint(content(), tmp_path / name_of(1))
    with pytest.raises(OSError):
        files.teardown()
    files.save_checkpoint(content(), tmp_path / name_of(1))
    try:
        raise RuntimeError("diverged")
    except RuntimeError:
        files.teardown()
    assert "not written" in caplog.text


def folder_with(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        CheckpointFiles().save_checkpoint(content(), tmp_path / name_of(step))
    return tmp_path


def test_the_newest_are_kept_and_linked_whether_files_or_folders(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5, 20, 100)
    sharded = folder / name_of(1_000_000_000)
    sharded.mkdir()
    assert "unfinished" in str(inspect(sharded).damage)
    for rank in range(2):
        assert "unfinished" in str(inspect(sharded).damage)
        CheckpointFiles().save_checkpoint(part_of(content(), rank, lambda value: None), part_path(sharded, rank, 2))
    assert inspect(sharded).damage is None
    point_last(sharded)
    keep_newest(folder, 2)
    assert by_step(folder) == [sharded, folder / name_of(100)]
    assert os.readlink(folder / "last.ckpt") == sharded.name and inspect(folder / "last.ckpt").damage is None
    assert sorted(path.suffix for path in folder.iterdir()) == [".ckpt", ".ckpt", ".ckpt", ".sha256"]


def test_where_links_are_not_possible_last_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, 1, 2)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(checkpoint_folder.Path, "symlink_to", refuse)
    point_last(folder / name_of(1))
    monkeypatch.setattr(checkpoint_folder.Path, "hardlink_to", refuse)
    point_last(folder / name_of(2))
    last = folder / "last.ckpt"
    assert not last.is_symlink() and last.read_bytes() == (folder / name_of(2)).read_bytes()
    assert all_newest_first(folder) == [folder / name_of(2), folder / name_of(1), last]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1)
    (folder / ".step-000000002.ckpt.partial").write_bytes(b"half")
    sidecar(folder / name_of(2)).write_text("orphan")
    sweep(folder)
    assert {path.name for path in folder.iterdir()} == {name_of(1), name_of(1) + ".sha256"}


@pytest.mark.parametrize("entry", ["state_dict", "current_model_state"])
def test_no_run_goes_on_from_weights_that_are_no_numbers(entry: str, tmp_path: Path) -> None:
    path = tmp_path / name_of(7)
    CheckpointFiles().save_checkpoint({**content(), entry: {"w": torch.full((1000,), float("nan"))}}, path)
    with pytest.raises(ValueError, match=rf"checkpoint: .*{path.name} 1,000 of 1,000 values of w are NaN or infinite"):
        CheckpointFiles().load_checkpoint(path)
