from pathlib import Path

import pytest

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.folders import find_folder
from ssmpretrain.datamodules.shards.paths import find_shards
from ssmpretrain.datamodules.shards.remote_paths import _check_address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (0, 1, 2, 4, 9):
        (tmp_path / f"a-{number:03d}.tar").touch()
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_file_a_folder_a_glob_a_range_and_a_list_are_understood(folder: Path) -> None:
    everything = ["a-000.tar", "a-001.tar", "a-002.tar", "a-004.tar", "a-009.tar"]
    assert names(find_shards(f"{folder}/a-001.tar", where="x")) == ["a-001.tar"]
    assert names(find_shards(f"{folder}", where="x")) == everything
    assert names(find_shards(f"{folder}/a-*.tar", where="x")) == everything
    assert names(find_shards(f"{folder}/a-{{000..002}}.tar", where="x")) == everything[:3]
    assert names(find_shards([f"{folder}/a-009.tar", f"{folder}/a-{{000..001}}.tar"], where="x")) == [
        "a-009.tar",
        "a-000.tar",
        "a-001.tar",
    ]


def test_gaps_in_a_range_are_counted_and_named(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^x: 5 of the 10 files .* missing: a-003.tar, a-005.tar, .*a-008.tar\."
    ):
        find_shards(f"{folder}/a-{{000..009}}.tar", where="x")


def test_a_range_without_any_file_says_what_is_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of the 1,024 files .* holds 5 \.tar"):
        find_shards(f"{folder}/b-{{000000..001023}}.tar", where="x")


def test_a_missing_file_says_what_the_nearest_folder_holds(folder: Path) -> None:
    (folder / "b.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"no file .*c\.tar; the folder .* holds 5 \.tar, 1 \.tar\.gz"):
        find_shards(f"{folder}/c.tar", where="x")
    with pytest.raises(FileNotFoundError, match=r"the nearest folder that exists, .*, holds 5 \.tar"):
        find_shards(f"{folder}/no/where/c.tar", where="x")
    with pytest.raises(FileNotFoundError, match=r"0 files match .*z-\*\.tar; the folder"):
        find_shards(f"{folder}/z-*.tar", where="x")


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.tar file in .* is empty"):
        find_shards(str(tmp_path), where="x")


@pytest.mark.parametrize("pattern", ["", "  ", [], ["a", ""]])
def test_an_empty_pattern_is_refused(pattern: str | list[str]) -> None:
    with pytest.raises(ValueError, match="is a path, a pattern or a list"):
        find_shards(pattern, where="x")


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"named once; got .*a-001\.tar more than once"):
        find_shards([f"{folder}/a-001.tar", f"{folder}/a-*.tar"], where="x")


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "ssh://host/a.tar", "ftp://host/a.tar", "simplecache::s3://a/b.tar"])
def test_no_shell_is_started_and_no_other_scheme_read(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"no command is started|local paths and http, https, s3"):
        find_shards(url, where="x")


def test_a_file_url_is_a_path(folder: Path) -> None:
    assert find_shards(f"file://{folder}/a-{{000..001}}.tar", where="x") == [folder / "a-000.tar", folder / "a-001.tar"]


def test_unbalanced_braces_and_absurd_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="braces come in pairs"):
        find_shards("a-{000..}x{.tar", where="x")
    with pytest.raises(ValueError, match="more than 1,000,000"):
        find_shards("a-{0..99999999999}.tar", where="x")


def test_a_file_in_place_of_a_folder_is_said_to_be_one(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is a folder; got the file"):
        find_folder(f"{folder}/a-000.tar", where="x")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://[::1/a.tar", "Invalid IPv6 URL"),
        ("http://[::g]/a.tar", "'::g' does not appear to be an IPv4 or IPv6 address|Invalid IPv6|no host|not a valid"),
        ("https://host:99999/a.tar", "Port out of range"),
        ("https://host:http/a.tar", "Port could not be cast"),
        ("https:///a.tar", "no host"),
        ("http://:80/a.tar", "no host"),
        ("s3://[x/a-*.tar", "Invalid IPv6 URL"),
        ("http://host/a\x1b[2J.tar", "control characters"),
    ],
)
def test_an_address_that_is_none_is_refused_in_words(url: str, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=rf"^x: a URL names a host and a file; got .* \(.*({said}).*\)\. Correct"):
        find_shards(url, where="x")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:8080/a.tar",
        "https://me:secret@host/a b/ä.tar?signature=%2F",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a.tar",
        "s3://Bucket_1.x/a.tar",
        "hf://datasets/owner/name@refs%2Fpr%2F1/a.tar",
        "gs://bucket/a[b].tar",
    ],
)
def test_addresses_of_all_kinds_are_taken(url: str) -> None:
    _check_address(url, "x")


def test_an_address_that_a_library_refuses_is_refused_in_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"^hf://x: its address is not valid \(Repository id"):
        find_shards("hf://x", where="x")


@pytest.mark.parametrize("target", ["nowhere", "a.tar"])
def test_a_link_to_nothing_is_said_to_be_one(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.tar").symlink_to(target)
    with pytest.raises(FileNotFoundError, match=rf"x: .*a\.tar is a link to nothing \({target}\)\. Correct the link"):
        find_shards(f"{tmp_path}/a.tar", where="x")
    with pytest.raises(FileNotFoundError, match="x: no file"):
        find_shards(f"{tmp_path}/b.tar", where="x")


@pytest.mark.parametrize("text", ["{a,b}" * 60, "a-{0..100000000..2}", "a-{-5..9999999}", "{0..999}" * 3])
def test_combinations_in_braces_without_end_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="names more than 1,000,000 files"):
        find_shards(text, where="x")
