"""Images of a folder that cannot be read for a while."""

import errno
from collections import Counter
from pathlib import Path

import pytest
from damaged import SMALL, causes, encoded

from ssmpretrain.datamodules import ImageFolder
from ssmpretrain.datamodules.files import patience
from ssmpretrain.datamodules.splits import folder_split


def test_a_file_of_a_folder_is_read_again_and_then_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded("PNG"))
    data = ImageFolder(str(tmp_path), **SMALL)
    data.setup("fit")
    asked: Counter[str] = Counter()
    read = folder_split.read_file

    def fail(path: Path) -> bytes:
        asked[path.name] += 1
        if (path.name == "1.png" and asked[path.name] < 3) or path.name == "2.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(folder_split, "read_file", fail)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert sum(len(batch["key"]) for batch in data.bank_dataloader()) == 3
    assert causes(data) == {"unreadable files": 1}
    assert asked["1.png"] == 3 and asked["2.png"] == patience.PATIENT.attempts
