"""`zeroshot` from its command line, and its results against those of the run and of NumPy on the saved file."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from captioned import COLOURS, TEMPLATES, captioned_shard, picture
from forked_ranks import in_ranks
from torchvision.io import write_png

from ssmpretrain.cli import main

Run = Callable[..., tuple[int, str, str]]
TRUST = ("--trust", "captioned")
CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "ssmpretrain.objectives.CLIP",
        "init_args": {
            "encoder": "test_vim",
            "encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 2},
            "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 16},
            "embed_dim": 16,
            "optimizer": {"lr_per_256": 0.16},
        },
    },
    "data": {
        "class_path": "captioned.Colours",
        "init_args": {
            "train": "train/colours-*.tar", "val": "val/colours-*.tar", "caption": "json.captions", "image_size": 32,
            "batch_size": 8, "num_workers": 0,
        },
    },
    "trainer": {
        "accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "ssmpretrain.callbacks.ZeroShot", "init_args": {"untrained": True}},
            {"class_path": "ssmpretrain.callbacks.EMA", "init_args": {"decay": 0.5}},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with image-text shards `train` and `val`, the folder of images `images` and the run `run` of CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    captioned_shard(folder / "train", 24)
    captioned_shard(folder / "val", 20, start=100)
    for number in range(100, 120):
        place = folder / "images" / list(COLOURS)[number % 4]
        place.mkdir(parents=True, exist_ok=True)
        write_png(picture(number), str(place / f"{number}.png"))
    (folder / "clip.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "clip.yaml", "--run_dir", "run"]) == 0
    return folder


@pytest.fixture
def run(call: Run, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, standard output and our own lines of standard error, in an empty folder with links to the work."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val", "images", "run"):
        (tmp_path / name).symlink_to(work / name)
    return lambda *words: call(*words, *(TRUST if words[0] == "zeroshot" else ()))


def logged(work: Path, name: str) -> float:
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row][-1]


def results(path: str = "out.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


NAMED = ("--num-workers", "0", "--batch-size", "7")


def test_a_run_gets_the_numbers_that_it_logged(run: Run, work: Path) -> None:
    code, out, message = run("zeroshot", "run", "--no-ema", "--json", "out.json")
    assert (code, message) == (0, "")
    found = results()
    assert found["zero_shot"]["names"] == list(COLOURS) and found["zero_shot"]["templates"] == list(TEMPLATES)
    assert found["zero_shot"]["chance"] == 0.25 and found["zero_shot"]["held_out_labels"] == [3]
    for name in ("top1", "top5", "held_out"):
        assert found["zero_shot"][name] == pytest.approx(logged(work, f"val/zeroshot_{name}"))
    for name in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"):
        assert found["retrieval"][name] == pytest.approx(logged(work, f"val/{name}"))
    assert "20 images; CLIP of test_vim, images of 32 x 32" in out
    assert "zero-shot, 20 images of 4 classes, 2 templates:" in out and "of the 1 held-out classes" in out
    assert "retrieval, 20 images and 40 captions:" in out
    assert f"top-1 {100 * found['zero_shot']['top1']:.2f} %   (chance 25.00 %)" in out


def test_what_a_run_reports_is_judged_unless_asked_otherwise(run: Run, work: Path) -> None:
    assert run("zeroshot", "run", "--json", "out.json")[0] == 0
    for name in ("i2t_r5", "t2i_r1"):
        assert results()["retrieval"][name] == pytest.approx(logged(work, f"val/{name}_ema"))


def test_saved_embeddings_give_the_same_numbers_to_numpy(run: Run) -> None:
    assert run("zeroshot", "run", "--json", "out.json", "--save", "out.npz")[0] == 0
    found, saved = results(), np.load("out.npz", allow_pickle=False)
    image, text = saved["image_embeddings"], saved["text_embeddings"]
    assert image.shape == (20, 16) and text.shape == (40, 16) and saved["class_embeddings"].shape == (4, 16)
    assert saved["class_names"].tolist() == list(COLOURS) and saved["keys"][0] == "0100"
    assert np.allclose(np.linalg.norm(image, axis=1), 1) and 1 <= saved["logit_scale"] <= 100
    predicted = (image @ saved["class_embeddings"].T).argmax(1)
    assert (predicted == saved["labels"]).mean() == found["zero_shot"]["top1"]
    unseen = np.isin(saved["labels"], saved["held_out_labels"])
    assert (predicted == saved["labels"])[unseen].mean() == found["zero_shot"]["held_out"]
    similarity = image.astype(float) @ text.T.astype(float)
    assert (saved["text_owner"][similarity.argmax(1)] == np.arange(20)).mean() == found["retrieval"]["i2t_r1"]
    assert (similarity.argmax(0) == saved["text_owner"]).mean() == found["retrieval"]["t2i_r1"]
    assert json.loads(str(saved["metadata"])) == found


def test_named_images_are_classified_by_the_names_given(run: Run) -> None:
    words = ("zeroshot", "run/checkpoints/last.ckpt", *NAMED, "--json")
    assert (
        run(*words, "shards.json", "--data", "val", "--classes", "red,green,blue,white", "--templates", "a {}")[0] == 0
    )
    Path("names.txt").write_text("\n".join(COLOURS))
    Path("templates.txt").write_text("a {}\n")
    files = ("--classes", "names.txt", "--templates", "templates.txt")
    assert run(*words, "files.json", "--data", "val", *files)[0] == 0
    shards, files = results("shards.json"), results("files.json")
    assert shards["zero_shot"] == files["zero_shot"] and shards["retrieval"] is None
    assert "held_out" not in shards["zero_shot"]


def test_folders_name_their_own_classes_in_their_own_order(run: Run) -> None:
    code, _, message = run("zeroshot", "run", "--data", "images", *NAMED, "--json", "out.json")
    assert (code, message) == (0, "")
    assert results()["zero_shot"]["names"] == sorted(COLOURS) and len(results()["zero_shot"]["templates"]) == 80


def test_names_in_another_order_or_more_of_them_find_their_folders(run: Run) -> None:
    for classes in ("red,green,blue,white", "violet,white,red,green,blue", ",".join(sorted(COLOURS))):
        words = ("--data", "images", *NAMED, "--classes", classes, "--templates", "a {}", "--save", f"{classes[0]}.npz")
        assert run("zeroshot", "run", *words)[0] == 0
        saved = np.load(f"{classes[0]}.npz")
        assert [str(saved["class_names"][label]) for label in saved["labels"]] == [
            key.partition("/")[0] for key in saved["keys"]
        ]


def test_what_the_callback_of_the_run_judged_is_judged_again(run: Run, work: Path) -> None:
    config = yaml.safe_load((work / "run" / "config.yaml").read_text())
    online = {"classes": sorted(COLOURS), "templates": "a {}", "data": "images"}
    config["trainer"]["callbacks"][0]["init_args"] |= online
    Path("other/checkpoints").mkdir(parents=True)
    Path("other/checkpoints/last.ckpt").symlink_to(work / "run" / "checkpoints" / "last.ckpt")
    Path("other/config.yaml").write_text(yaml.safe_dump(config))
    assert run("zeroshot", "other", "--json", "other.json")[0] == 0
    named = ("--data", "images", "--templates", "a {}")
    assert run("zeroshot", "run", *named, *NAMED, "--json", "named.json")[0] == 0
    assert results("other.json")["zero_shot"] == results("named.json")["zero_shot"]
    assert results("other.json")["retrieval"] is None


def test_folders_named_by_wordnet_numbers_need_names(run: Run) -> None:
    for name, colour in (("n01440764", "red"), ("n01443537", "blue")):
        Path("wordnet").mkdir(exist_ok=True)
        Path("wordnet", name).symlink_to(Path("images", colour).resolve())
    code, _, message = run("zeroshot", "run", "--data", "wordnet", *NAMED)
    assert code == 2 and "named by WordNet numbers (n01440764, ...)" in message and "classes imagenet" in message
    assert run("zeroshot", "run", "--data", "wordnet", *NAMED, "--classes", "tench,goldfish")[0] == 0


def test_captions_of_named_shards_are_retrieved(run: Run, work: Path) -> None:
    words = ("zeroshot", "run", "--data", "val", "--captions", "json.captions", *NAMED, "--json")
    code, out, _ = run(*words, "out.json")
    assert code == 0 and results()["zero_shot"] is None and "zero-shot," not in out
    assert results()["retrieval"]["i2t_r5"] == pytest.approx(logged(work, "val/i2t_r5"))
    assert run(*words, "both.json", "--classes", ",".join(COLOURS))[0] == 0
    assert (
        results("both.json")["retrieval"] == results()["retrieval"] and results("both.json")["zero_shot"]["top1"] >= 0
    )


def test_the_weights_in_training_and_their_average_are_two_models(run: Run) -> None:
    for flag in ("--ema", "--no-ema"):
        assert run("zeroshot", "run", flag, "--save", f"{flag[2:]}.npz")[0] == 0
    ema, trained = (np.load(f"{flag[2:]}.npz")["image_embeddings"] for flag in ("--ema", "--no-ema"))
    assert not np.allclose(ema, trained)


def test_an_export_for_open_clip_gets_the_numbers_of_the_run_and_of_open_clip(run: Run) -> None:
    assert run("export", "run", "exported", "--format", "open_clip")[0] == 0
    assert run("zeroshot", "run", "--save", "run.npz")[0] == 0
    words = ("zeroshot", "exported", "--data", "val", "--captions", "json.captions", *NAMED)
    assert run(*words, "--classes", ",".join(COLOURS), "--templates", "a {} square", "--save", "exported.npz")[0] == 0
    first, second = np.load("run.npz"), np.load("exported.npz")
    for name in ("image_embeddings", "text_embeddings", "logit_scale"):
        assert np.allclose(first[name], second[name], atol=1e-5)
    model = open_clip.create_model("local-dir:exported")
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("local-dir:exported"), list(COLOURS), ["a {} square"]
    )
    assert np.allclose(second["class_embeddings"], theirs.T.numpy(), atol=1e-5)


def of_rank(folder: Path, world: int) -> int:
    torch.set_num_threads(1)
    os.chdir(folder)
    return main(["zeroshot", "run", "--json", f"{world}.json", "--save", f"{world}.npz", *TRUST])


@pytest.mark.slow
def test_several_ranks_write_what_one_process_writes(run: Run, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        assert in_ranks(world, of_rank, tmp_path, world) == [0] * world
    alone, first = results("1.json"), np.load("1.npz")
    for world in (2, 4):
        assert results(f"{world}.json") == alone
        saved = np.load(f"{world}.npz")
        assert saved["keys"].tolist() == first["keys"].tolist()
        assert saved["text_owner"].tolist() == first["text_owner"].tolist()
        assert np.allclose(saved["image_embeddings"], first["image_embeddings"], atol=1e-6)


def words(*words: str) -> tuple[str, ...]:
    return words


MISTAKES = {
    "no classes": (words("run", "--data", "val", *NAMED), "every label has a name; got no --classes. Give imagenet"),
    "too few names": (words("run", "--data", "val", *NAMED, "--classes", "a,b"), "got 2 names and label 3"),
    "folders": (words("run", "--data", "images", *NAMED, "--classes", "imagenet"), "got 1000 names and 4 folders"),
    "no place": (
        words("run", "--templates", "a photo, of a thing"),
        "a template has {} where the name of the class goes",
    ),
    "no such run": (words("runs/none"), "no such file: runs/none"),
    "captions alone": (words("run", "--captions", "txt"), "--captions is for shards named by --data"),
    "captions of a folder": (words("run", "--data", "images", "--captions", "txt"), "captions are in shards"),
    "no such data": (words("run", "--data", "none", "--classes", "a,b"), "none"),
    "there already": (words("run", "--json", "there.json"), "there.json exists, and nothing is overwritten"),
    "another ending": (words("run", "--save", "out.csv"), "the file ends in .npz"),
    "of no run": (words("elsewhere/last.ckpt"), "belongs to no run, so no config.yaml names its data"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_and_exit_code_2(mistake: str, run: Run, work: Path) -> None:
    Path("there.json").touch()
    Path("elsewhere").mkdir()
    Path("elsewhere/last.ckpt").symlink_to(work / "run" / "checkpoints" / "last.ckpt")
    asked, expected = MISTAKES[mistake]
    code, _, message = run("zeroshot", *asked)
    assert code == 2 and expected in message and message.count("\n") == 0
    assert not Path("out.csv").exists()


def test_a_run_without_a_text_tower_is_refused_with_what_to_do(run: Run, run_folder: Path) -> None:
    code, _, message = run("zeroshot", run_folder)
    assert code == 2
    assert re.search(r"is one of MAE\. .*--model\.init_from", message)


def test_what_a_run_began_with_need_not_be_there_any_more(run: Run, run_folder: Path, tmp_path: Path) -> None:
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    content["hyper_parameters"]["init_from"] = "gone/last.ckpt"
    content["hyper_parameters"]["text"]["init_from"] = "gone/too"
    content["hyper_parameters"]["encoder_args"]["checkpoint_path"] = "gone/as/well.pth"
    torch.save(content, "moved.ckpt")
    names = ("--data", "val", "--classes", ",".join(COLOURS), *NAMED)
    assert run("zeroshot", "moved.ckpt", *names, "--json", "moved.json")[0] == 0
    assert run("zeroshot", "run", *names, "--json", "run.json")[0] == 0
    assert results("moved.json")["zero_shot"] == results("run.json")["zero_shot"]


def test_reconstruct_goes_on_refusing_what_cannot_reconstruct(run: Run) -> None:
    code, _, message = run("reconstruct", "run", "images")
    assert code == 2 and "is of a run of CLIP, which predicts no pixels. MAECLIP does" in message
