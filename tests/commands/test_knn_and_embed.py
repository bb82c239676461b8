"""`knn` and `embed` from their command lines, and their results against other implementations."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from jobs import start
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.datamodules import ImageFolder
from ssmpretrain.encoders import create_encoder

ROOT = Path(ssmpretrain.__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `fit` on 90 and 60 digits, with online evaluation, in the folder `run` of the one returned."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMPRETRAIN_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        words = [
            "--config", "quickstart_mae", "--run_dir", "run", "--trainer.max_epochs", "1", "--data.batch_size", "16",
            "--data.train_images", "90", "--data.val_images", "60", "--trainer.enable_progress_bar", "false",
            "--trainer.callbacks", "ssmpretrain.callbacks.OnlineEvaluation",
            "--trainer.callbacks.max_bank", "70", "--trainer.callbacks.max_queries", "50",
            "--trainer.callbacks.k", "7",
        ]  # fmt: skip
        assert main(["fit", *words]) == 0
    return folder


@pytest.fixture
def run(call: Run, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, standard output and our own lines of standard error, in an empty folder beside the link `run`."""
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(digits_run / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(digits_run / "run")
    return call


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Image folders `train` (6 cats, 4 dogs) and `val` (3 and 3) of noise."""
    noise = torch.Generator().manual_seed(0)
    for split, cats, dogs in (("train", 6, 4), ("val", 3, 3)):
        for name, count in (("cat", cats), ("dog", dogs)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=noise)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


NAMED = ("--train", "train", "--val", "val", "--num-workers", "0", "--batch-size", "4")


def results(path: str = "out.json") -> dict:
    return json.loads(Path(path).read_text())


def logged(folder: Path, name: str, run: str = "run") -> float:
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return next(row[name] for row in rows if name in row)


def test_a_run_gets_the_numbers_that_were_logged_online(run: Run, digits_run: Path) -> None:
    limits = ("--max_bank", "70", "--max_queries", "50")
    code, out, message = run("knn", "run", "--k", "7", "--logistic", "--json", "out.json", *limits)
    assert (code, message) == (0, "")
    assert "bank 70 images of 10 classes, queries 50; mean of the last block of test_vim, images of 32 x 32" in out
    found = results()
    assert np.float32(found["knn"][0]["top1"]) == np.float32(logged(digits_run, "val/knn"))
    assert np.float32(found["logistic"]) == np.float32(logged(digits_run, "val/linear_probe"))
    assert f"{100 * found['knn'][0]['top1']:.2f} %" in out


@pytest.mark.slow
def test_a_run_with_views_and_a_teacher_gets_the_numbers_that_were_logged_online(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config", "quickstart", "--run_dir", "dino", "--trainer.max_epochs", "1", "--data.batch_size", "16",
        "--data.train_images", "90", "--data.val_images", "60", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks", "ssmpretrain.callbacks.OnlineEvaluation", "--trainer.callbacks.k", "7",
        "--model", "ssmpretrain.objectives.DINO", "--model.encoder", "test_vim", "--model.num_prototypes", "64",
        "--trainer.gradient_clip_val", "null",
        "--model.encoder_args", "{img_size: 32, patch_size: 8}", "--model.momentum.start", "0.5",
        "--data.views", "[{count: 2, crop_scale: [0.5, 1.0]}, {count: 2, size: 16, local: true}]",
    ]  # fmt: skip
    assert main(["fit", *words]) == 0
    assert run("knn", "dino", "--k", "7", "--logistic", "--json", "out.json")[0] == 0
    found = results()
    assert found["pooling"] == "class" and found["weights"] == "teacher in state_dict"
    assert np.float32(found["knn"][0]["top1"]) == np.float32(logged(tmp_path, "val/knn", "dino"))
    assert np.float32(found["logistic"]) == np.float32(logged(tmp_path, "val/linear_probe", "dino"))


@pytest.mark.parametrize("pooling", [("--pooling", "both", "--last-blocks", "2"), ()])
def test_scikit_learn_and_numpy_find_the_same_accuracy_in_embedded_features(run: Run, pooling: tuple[str]) -> None:
    for split in ("train", "val"):
        assert run("embed", "run", f"{split}.npz", "--split", split, *pooling)[0] == 0
    train, val = (np.load(f"{split}.npz", allow_pickle=False) for split in ("train", "val"))
    assert train["features"].shape == (90, 96 if not pooling else 384) and train["features"].dtype == np.float32
    ks, temperatures = ("5", "20"), ("0.05", "0.5")
    assert run("knn", "run", "--k", *ks, "--temperature", *temperatures, "--json", "out.json", *pooling)[0] == 0
    rows = {(row["k"], row["temperature"]): row["top1"] for row in results()["knn"]}
    assert len(rows) == 4
    bank, queries = train["features"].astype(np.float64), val["features"].astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    similarity = queries @ bank.T
    for (k, temperature), accuracy in rows.items():
        learner = KNeighborsClassifier(k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t))
        learner.fit(train["features"].astype(np.float64), train["labels"])
        assert learner.score(val["features"].astype(np.float64), val["labels"]) == accuracy
        correct = 0
        for row, truth in zip(similarity, val["labels"], strict=True):
            nearest = np.argsort(-row)[:k]
            votes = np.bincount(train["labels"][nearest], np.exp(row[nearest] / temperature), minlength=10)
            correct += votes.argmax() == truth
        assert correct / 60 == accuracy


def test_embedded_features_are_those_of_the_encoder_in_the_order_of_the_data(run: Run, folders: Path) -> None:
    code, out, _ = run("embed", "run", "val.npz", *NAMED, "--image-size", "48")
    assert code == 0 and "wrote val.npz: 6 images x 96 features, float32" in out
    found = np.load("val.npz", allow_pickle=False)
    assert found["keys"].tolist() == [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1] and found["labels"].dtype == np.int64
    encoder = ssmpretrain.load_encoder("run", num_classes=0).eval()
    encoder.set_input_size(img_size=(48, 48))
    data = ImageFolder("train", "val", image_size=48, eval_crop_ratio=1.0, num_workers=0)
    with torch.no_grad():
        maps = [encoder.forward_intermediates(b["image"], indices=1, norm=True, intermediates_only=True)[0]
                for b in data.val_dataloader()]  # fmt: skip
    np.testing.assert_allclose(found["features"], torch.cat(maps).mean(dim=(2, 3)).numpy(), atol=1e-5)
    metadata = json.loads(str(found["metadata"]))
    assert metadata["encoder"] == "test_vim" and metadata["pooling"] == "mean" and metadata["skipped"] == {}
    assert metadata["images"] == {
        "size": [48, 48], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic", "crop_pct": 1.0,
    }  # fmt: skip
    assert metadata["data"] == {"class": "ImageFolder", "split": "val", "path": "val", "classes": ["cat", "dog"]}


def test_a_file_name_that_is_no_utf_8_is_written_to_both_kinds_of_file(run: Run, folders: Path) -> None:
    os.rename(folders / "val" / "cat" / "0.png", os.fsencode(folders / "val" / "cat") + b"/caf\xe9.png")
    for out in ("a.parquet", "a.npz"):
        code, _, message = run("embed", "run", out, "--val", "val", "--num-workers", "0", "--batch-size", "4")
        assert (code, message) == (0, "")
    assert "cat/caf\\xe9.png" in pyarrow.parquet.read_table("a.parquet")["key"].to_pylist()
    keys = np.load("a.npz", allow_pickle=False)["keys"].tolist()
    assert b"cat/caf\xe9.png" in [os.fsencode(key) for key in keys]


def test_parquet_holds_what_npz_holds(run: Run) -> None:
    for out in ("a.npz", "a.parquet", "half.parquet"):
        dtype = "float16" if out.startswith("half") else "float32"
        assert run("embed", "run", out, "--split", "train", "--limit", "33", "--dtype", dtype)[0] == 0
    arrays, table = np.load("a.npz", allow_pickle=False), pyarrow.parquet.read_table("a.parquet")
    assert table["key"].to_pylist() == arrays["keys"].tolist() and table.num_rows == 33
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), arrays["features"])
    half = pyarrow.parquet.read_table("half.parquet")["features"].to_pylist()
    np.testing.assert_array_equal(np.array(half, np.float16), arrays["features"].astype(np.float16))
    metadata = json.loads(str(arrays["metadata"]))
    assert {**json.loads(table.schema.metadata[b"ssmpretrain"]), "skipped": {}} == metadata
    assert pyarrow.parquet.read_metadata("a.parquet").metadata[b"ssmpretrain.outcome"] == b'{"skipped": {}}'


def test_few_shots_are_averaged_over_draws_that_the_seed_decides(run: Run) -> None:
    words = ("knn", "run", "--k", "5", "500", "--shots", "1", "4", "--repeats", "4")
    code, out, _ = run(*words, "--json", "out.json")
    assert code == 0 and "k 500 is cut to 90, the images in the bank" in out
    rows = results()["knn"]
    assert [(row["shots"], row["k"]) for row in rows] == [(None, 5), (None, 90), (1, 5), (1, 10), (4, 5), (4, 40)]
    assert rows[0]["top1_std"] is None and all(row["top1_std"] >= 0 for row in rows[2:])
    assert run(*words, "--json", "again.json")[0] == 0 and results("again.json") == results()
    assert run(*words, "--json", "other.json", "--seed", "1")[0] == 0
    assert results("other.json")["knn"][:2] == rows[:2] and results("other.json")["knn"] != rows


@pytest.mark.parametrize("encoder", ["test_vmamba", "test_vit"])
def test_other_encoders_and_files_are_read(encoder: str, run: Run, folders: Path) -> None:
    torch.manual_seed(0)
    state = create_encoder(encoder, num_classes=0).state_dict()
    save_file(state, "file.safetensors", {"encoder": json.dumps({"name": encoder, "args": {}})})
    code, out, _ = run("knn", "file.safetensors", *NAMED, "--k", "3", "--precision", "bf16", "--image_size=64")
    assert code == 0 and f"queries 6; mean of the last block of {encoder}, images of 64 x 64" in out


def test_the_average_or_the_weights_in_training_are_taken(run: Run) -> None:
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    content["current_model_state"] = dict(content["state_dict"])
    name = "encoder.norm_f.weight"
    content["state_dict"][name] = 2 * content["state_dict"][name]
    torch.save(content, "average.ckpt")
    data = ("--train", "run/../cache/digits-*/train-*.tar", "--val", "run/../cache/digits-*/val-*.tar")
    data = tuple(word.replace("run/..", str(Path("run").resolve().parent)) for word in data)
    for flag in ("--ema", "--no-ema"):
        assert run("embed", "average.ckpt", f"{flag}.npz".strip("-"), flag, *data)[0] == 0
    average, trained = (np.load(name)["features"] for name in ("ema.npz", "no-ema.npz"))
    np.testing.assert_allclose(average, 2 * trained, atol=1e-5)


def test_bad_images_are_counted_and_said(run: Run, folders: Path) -> None:
    (folders / "val" / "cat" / "1.png").write_bytes(b"no image")
    (folders / "train" / "dog" / "0.png").write_bytes(b"")
    code, out, _ = run("embed", "run", "val.npz", *NAMED)
    assert code == 0 and "left out of val: 1 undecodable images" in out and "wrote val.npz: 5 images" in out
    found = np.load("val.npz")
    assert "cat/1.png" not in found["keys"] and len(found["features"]) == 5
    assert json.loads(str(found["metadata"]))["skipped"] == {"undecodable images": 1}
    code, out, _ = run("knn", "run", *NAMED, "--k", "3")
    assert code == 0 and "left out of val: 1 undecodable images" in out and "left out of train: 1" in out


def write_shard(path: str, labels: list[int | None]) -> None:
    import tarfile

    noise = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            image = io.BytesIO()
            Image.fromarray(noise.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(image, "PNG")
            fields = {"png": image.getvalue(), **({} if label is None else {"cls": str(label).encode()})}
            for suffix, content in fields.items():
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


SHARDS = ("--train", "t.tar", "--val", "v.tar", "--num-workers", "0")


def test_classes_that_the_bank_lacks_and_images_without_labels_are_said(run: Run) -> None:
    write_shard("t.tar", [0, 1, 0, 10**12, None, 1])
    write_shard("v.tar", [0, 7, 1, None, 9, 7, 10**12])
    code, out, _ = run("knn", "run", *SHARDS, "--k", "2", "--json", "out.json")
    assert code == 0 and "bank 5 images of 3 classes, queries 6" in out
    assert "left out of train: 1 images without a label" in out and "left out of val: 1 images without" in out
    assert "wrong by necessity: 3 queries of classes that the bank lacks: 7, 9" in out
    assert results()["knn"][0]["top5"] <= 0.5


def test_sets_that_were_packed_apart_vote_for_the_same_classes(run: Run, folders: Path) -> None:
    """Three classes and two of them, the same images: the nearest neighbour is the image itself."""
    (folders / "train" / "bat").mkdir()
    Image.new("RGB", (40, 50)).save(folders / "train" / "bat" / "0.png")
    for name in ("bat", "dog"):
        shutil.copytree(folders / "train" / name, folders / "some" / name)
    for name in ("train", "some"):
        assert run("shards", "pack", folders / name, f"{name}-shards")[0] == 0
    words = ("--num-workers", "0", "--k", "1", "--json", "out.json")
    code, out, _ = run("knn", "run", "--train", "train-shards", "--val", "some-shards", *words)
    assert code == 0 and results()["knn"][0]["top1"] == 1.0 and "wrong by necessity" not in out
    assert results()["val"]["classes"] == ["bat", "cat", "dog"]
    embedding = ("embed", "run", "out.npz", "--train", "train-shards", "--val", "some-shards", "--num-workers", "0")
    assert run(*embedding)[0] == 0
    assert np.load("out.npz")["labels"].tolist().count(2) == 4  # the dogs
    code, _, message = run("knn", "run", "--train", "some-shards", "--val", "train-shards", "--num-workers", "0")
    assert code == 2 and "(bat, dog); got cat, which the latter lacks" in message


def test_images_without_any_label_are_embedded_but_have_no_neighbours(run: Run) -> None:
    write_shard("t.tar", [None] * 4)
    write_shard("v.tar", [None] * 3)
    code, out, message = run("knn", "run", *SHARDS)
    assert (code, out) == (2, "")
    assert "neighbours vote with labels; got 4 images of train without one" in message and "embed" in message
    assert run("embed", "run", "v.npz", *SHARDS)[0] == 0
    assert np.load("v.npz")["labels"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("split", "cats", "dogs"), [("val", 3, 3), ("train", 6, 4)])
def test_images_of_one_split_alone_can_be_embedded(split: str, cats: int, dogs: int, run: Run, folders: Path) -> None:
    assert run("embed", "run", "a.npz", f"--{split}", split, "--num-workers", "0")[0] == 0
    assert np.load("a.npz")["labels"].tolist() == [0] * cats + [1] * dogs


def test_a_run_without_validation_images_says_so(run: Run, folders: Path) -> None:
    data = {"train": "train", "val": None, "batch_size": 4, "num_workers": 0, "image_size": 32}
    config = {"data": {"class_path": "ssmpretrain.datamodules.ImageFolder", "init_args": data}}
    copy_of_the_run(json.dumps(config))
    code, _, message = run("knn", "copy")
    assert code == 2 and "ImageFolder has no validation images" in message and "--val" in message
    assert run("embed", "copy/checkpoints/last.ckpt", "a.npz", "--split", "train")[0] == 0
    assert len(np.load("a.npz")["features"]) == 10


def test_a_strangers_run_imports_nothing_that_is_not_trusted(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "{class_path: gift.evil.Data, init_args: {train: train, image_size: 32, batch_size: 2}}"
    copy_of_the_run(f"data: {data}", "gift")
    Path("gift/evil.py").write_text("open('executed', 'w')\nfrom ssmpretrain.datamodules import ImageFolder as Data\n")
    monkeypatch.syspath_prepend(Path.cwd())  # as `python -m` does
    for words in (["knn", "gift"], ["embed", "gift", "a.npz", "--trust", "another", "--trust", "gift.evi"]):
        code, _, message = run(*words)
        assert code == 2 and not Path("executed").exists()
        assert "gift/config.yaml may name classes of ssmpretrain.datamodules alone" in message
        assert "got 'gift.evil.Data'" in message and "add --trust gift.evil." in message
    code, _, message = run("embed", "gift", "a.npz", "--split", "train", "--trust", "other", "--trust", "gift.evil")
    assert code == 0, message
    assert Path("executed").exists()


def weights_alone() -> list[str]:
    torch.save(create_encoder("test_vim", num_classes=0).state_dict(), "vim.pth")
    return ["knn", "vim.pth"]


def not_finite() -> list[str]:
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    content["state_dict"]["encoder.norm_f.weight"].fill_(float("nan"))
    torch.save(content, "nan.ckpt")
    return ["knn", "nan.ckpt", *NAMED]


def taken() -> list[str]:
    Path("taken.npz").write_text("precious")
    return ["embed", "run", "taken.npz"]


def copy_of_the_run(config: str, name: str = "copy") -> None:
    """A run with the checkpoint of `run` and another description of its data."""
    Path(name, "checkpoints").mkdir(parents=True)
    Path(name, "checkpoints/last.ckpt").symlink_to(Path("run/checkpoints/last.ckpt").resolve())
    Path(name, "config.yaml").write_text(config)


def configuration(text: str) -> Callable[[], list[str]]:
    return lambda: copy_of_the_run(text) or ["knn", "copy"]  # type: ignore[func-returns-value]


def class_of(class_path: str) -> Callable[[], list[str]]:
    return configuration(f"data: {{class_path: {class_path}, init_args: {{command: touch hacked}}}}")


class_of_another_kind = class_of("os.system")


def words(*given: str) -> Callable[[], list[str]]:
    return lambda: list(given)


MISTAKES: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "missing checkpoint": (words("knn", "gone.ckpt"), ["no such file", "gone.ckpt"]),
    "no run": (weights_alone, ["vim.pth belongs to no run", "--train and --val"]),
    "features that are not finite": (not_finite, ["nan.ckpt", "finite"]),
    "k": (words("knn", "run", "--k", "0"), ["--k is at least 1; got 0"]),
    "temperature": (words("knn", "run", "--temperature", "-1"), ["--temperature is finite and above 0; got -1"]),
    "shots": (words("knn", "run", "--shots", "0"), ["--shots is at least 1"]),
    "one of two": (words("knn", "run", "--val", "val"), ["one of --train and --val"]),
    "limit": (words("embed", "run", "a.npz", "--limit", "0"), ["limit is at least 1; got 0"]),
    "both kinds": (words("knn", "run", "--train", "x.tar", "--val", "val"), ["both image folders or both shards"]),
    "missing images": (words("knn", "run", "--train", "tain", "--val", "val"), ["tain"]),
    "images of the other split": (
        words("embed", "run", "a.npz", "--train", "train", "--split", "val"),
        ["--split val needs images; got --train alone"],
    ),
    "size": (words("knn", "run", "--image-size", "33"), ["multiples of 4", "33"]),
    "pooling": (words("knn", "run", "--last-blocks", "9"), ["last_blocks is between 1 and the 4", "9"]),
    "ending": (words("embed", "run", "a.csv"), [".npz or .parquet", "a.csv"]),
    "existing file": (taken, ["taken.npz exists", "nothing is overwritten"]),
    "another kind of class": (
        class_of_another_kind,
        ["os.system", "copy/config.yaml may name classes of ssmpretrain.datamodules alone"],
    ),
    "a class of ours of another kind": (
        class_of("ssmpretrain.datamodules.faults.bad_samples.BadSample"),
        ["names a LightningDataModule"],
    ),
    "a class that is no path": (class_of("ssmpretrain.datamodules..x"), ["add --trust MODULE"]),
    "options of another class": (
        class_of("ssmpretrain.datamodules.ImageShards"),
        ["the data that copy/config.yaml describes cannot be loaded (TypeError: ImageShards"],
    ),
    "an option of another kind": (
        configuration("data: {class_path: ssmpretrain.datamodules.ImageShards, init_args: {train: a, val: 7}}"),
        ["the data that copy/config.yaml describes cannot be loaded (TypeError"],
    ),
    "a configuration of another kind": (configuration("- a"), ["copy/config.yaml: a recipe sets options by name"]),
    "unknown option": (words("knn", "run", "--ks", "3"), ["--ks", "--help"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_short_message_and_exit_code_2(mistake: str, run: Run, folders: Path) -> None:
    make, expected = MISTAKES[mistake]
    before = {path.name for path in Path().iterdir()}
    given = make()
    code, out, message = run(*given)
    assert (code, out) == (2, "")
    assert message.count("\n") == 0 and len(message) < 500
    for part in expected:
        assert part in message
    assert {path.name for path in Path().iterdir()} - before <= {"vim.pth", "nan.ckpt", "taken.npz", "copy"}
    assert not Path("taken.npz").exists() or Path("taken.npz").read_text() == "precious"


def test_parquet_without_pyarrow_names_the_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, message = run("embed", "run", "a.parquet")
    assert code == 2 and "pip install pyarrow" in message and not Path("a.parquet").exists()


def test_two_ranks_find_what_one_finds(run: Run, tmp_path: Path) -> None:
    commands = [
        "knn run --k 3 20 --temperature 0.07 0.5 --shots 2 --logistic --num-workers 0 --json {}.json",
        "embed run {}.npz --num-workers 1",
        "embed run {}.parquet --split train --limit 41",
    ]
    for command in commands:
        assert run(*command.format("one").split())[0] == 0
    (tmp_path / "commands.py").write_text(
        f"import os\nos.chdir({str(tmp_path)!r})\n"
        "import ssmpretrain.commands.embed, ssmpretrain.commands.knn, ssmpretrain.datamodules.image_folder\n"
        "from forked_ranks import in_ranks\nfrom ssmpretrain.base.ranks import joined_ranks\n"
        "from ssmpretrain.cli import main\n\ndef rank():\n    with joined_ranks():\n"
        f"        return [main(line.format('two').split()) for line in {commands}]\n\n"
        "assert in_ranks(2, rank) == [[0, 0, 0], [0, 0, 0]]\n"
    )
    done = start(tmp_path / "commands.py", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 2  # only one rank speaks
    assert results("two.json") == results("one.json")
    one, two = np.load("one.npz"), np.load("two.npz")
    for name in ("keys", "labels", "metadata"):
        np.testing.assert_array_equal(one[name], two[name])
    np.testing.assert_allclose(one["features"], two["features"], atol=1e-5)
    tables = [pyarrow.parquet.read_table(f"{name}.parquet") for name in ("one", "two")]
    assert tables[0]["key"].to_pylist() == tables[1]["key"].to_pylist() and tables[0].num_rows == 41


def test_help_waits_for_no_trainer() -> None:
    code = "import sys\nfrom ssmpretrain.cli import main\n"
    for command in ("knn", "embed"):
        code += f"try: main(['{command}', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
    code += "assert not {'lightning', 'webdataset', 'sklearn', 'matplotlib', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--pooling" in done.stdout


def test_the_lines_of_the_page_for_scikit_learn_give_the_commands_numbers(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for line in re.findall(r"^    python -m ssmpretrain (embed .*)$", page, re.M):
        assert run(*line.replace("runs/quickstart", "run").split())[0] == 0
    assert run("knn", "run", "--logistic", "--k", "20", "--json", "out.json")[0] == 0
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    knn, probe = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert knn == results()["knn"][0]["top1"]
    assert probe == pytest.approx(results()["logistic"], abs=1 / 60)  # two optimisers of one convex problem
