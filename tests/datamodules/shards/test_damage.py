"""Shards that are damaged when a run starts: their usable part is read."""

from pathlib import Path

import pytest
from damaged import causes, evaluated, forget_indexes, shards

from ssmpretrain.datamodules.tar.index import index_path, locate_samples


def cut(path: Path, samples: float) -> None:
    offsets = [*locate_samples(path).offsets.tolist(), path.stat().st_size]
    whole = int(samples)
    end = offsets[whole] + (600 if samples > whole else 0)
    path.write_bytes(path.read_bytes()[:end])


def test_a_truncated_shard_with_an_index_keeps_its_place_in_the_plan(
    make_shards, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards([11, 8, 20])
    whole = shards(folder)
    cut(folder / "train-000001.tar", 5.5)
    data = shards(folder)
    data.setup("fit")
    assert data.fingerprint() == whole.fingerprint()
    assert "1 of 3 shards is damaged: train-000001.tar is truncated: 3 of its 8 samples are lost." in caplog.text
    assert evaluated(data) == [number for number in range(39) if number not in (16, 17, 18)]
    assert causes(data) == {"truncated shards": 3}
    assert len(list(data.train_dataloader())) == len(whole.train_dataloader())


@pytest.mark.parametrize("samples", [5, 5.5])
def test_of_a_truncated_shard_without_an_index_the_readable_samples_are_used(
    make_shards, caplog: pytest.LogCaptureFixture, samples: float
) -> None:
    folder = make_shards([11, 8, 20])
    cut(folder / "train-000001.tar", samples)
    forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    assert "1 of 3 shards is damaged: train-000001.tar is truncated after sample" in caplog.text
    assert causes(data, "train") == {"truncated shards": 1}
    assert evaluated(data)[:15] == list(range(15))
    assert set(evaluated(data)) >= set(range(19, 39))
    assert not set(evaluated(data)) & {16, 17, 18}


def test_a_sample_cut_off_between_its_fields_is_not_taken_for_an_unlabelled_one(make_shards) -> None:
    path = make_shards([8]) / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"0005.cls")])
    forget_indexes(path.parent)
    data = shards(path.parent)
    assert evaluated(data) == [0, 1, 2, 3, 4]
    assert [(record["cause"], record["key"]) for record in data.bad_records() if record["split"] == "bank"] == [
        ("truncated shards", "0005")
    ]


def test_samples_after_a_damaged_header_are_found_again_without_an_index(make_shards) -> None:
    folder = make_shards([20])
    path = folder / "train-000000.tar"
    content, offset = bytearray(path.read_bytes()), int(locate_samples(path).offsets[5])
    content[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    forget_indexes(folder)
    assert [number for number in evaluated(shards(folder)) if number not in (4, 5)] == [*range(4), *range(6, 20)]


def test_archives_that_were_joined_end_to_end_are_read_to_the_end(make_shards) -> None:
    folder = make_shards([5, 5])
    path = folder / "train-000000.tar"
    other = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes() + other.read_bytes())
    other.unlink()
    forget_indexes(folder)
    assert evaluated(shards(folder)) == list(range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>403 Forbidden</title>" + b" " * 600, "web page .'403 Forbidden'"),
        (b"\x1f\x8b" + bytes(6000), "compressed with gzip"),
        (b"no tar at all" * 100, "not a tar file"),
        (bytes(10240), "no image"),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_without_a_usable_sample_is_an_error_at_the_start(
    make_shards, content: bytes, message: str, indexed: bool
) -> None:
    folder = make_shards([11, 8, 20])
    (folder / "train-000001.tar").write_bytes(content)
    if not indexed:
        forget_indexes(folder)
    with pytest.raises(ValueError, match=rf"ImageShards: train: .*{message}") as error:
        shards(folder).setup("fit")
    assert "train-000001.tar" in str(error.value)


def test_too_many_lost_samples_stop_the_run_at_once_with_the_list(make_shards) -> None:
    folder = make_shards([40, 40])
    for number in (0, 1):
        cut(folder / f"train-{number:06d}.tar", 20)
    with pytest.raises(ValueError, match=r"2 of 2 shards are damaged: .*000000.*20 of its 40.*000001.*least 40 of 80"):
        shards(folder).setup("fit")
    assert len(evaluated(shards(folder, max_bad_fraction=0.6))) == 40


def test_none_is_tolerated_where_none_is_allowed(make_shards) -> None:
    folder = make_shards([9], bad={4: {"png": b"no"}})
    with pytest.raises(ValueError, match=r"more than 0.00% .* 1 undecodable images"):
        evaluated(shards(folder, max_bad_fraction=0))
    folder = make_shards([9])
    cut(folder / "train-000000.tar", 8)
    forget_indexes(folder)
    with pytest.raises(ValueError, match="1 of 1 shards is damaged"):
        shards(folder, max_bad_fraction=0).setup("fit")


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_shard_with_a_stale_or_broken_index_is_counted_anew(make_shards, content: str | None) -> None:
    folder = make_shards([9])
    path = folder / "train-000000.tar"
    if content is None:
        (make_shards([30], prefix="other") / "other-000000.tar").replace(path)
    else:
        index_path(path).write_text(content)
    data = shards(folder)
    data.setup("fit")
    assert len(evaluated(data)) == (9 if content is not None else 30)
    if content is None:
        assert causes(data, "train") == {"stale indexes": 1}
    else:  # no sample is lost
        assert "train" not in data.bad_samples()
