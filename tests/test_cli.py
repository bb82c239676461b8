"""The command line as a person meets it: what it prints and how it exits."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.run.quiet import NOISE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]) -> Path:
    """A working folder with one good shard and one recipe."""
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "good" / "train-000000.tar")
    (tmp_path / "recipe.yaml").write_text(
        "model:\n  class_path: ssmpretrain.objectives.MAE\n  init_args: {encoder: test_vim, decoder_embed_dim: 32}\n"
        "data:\n  class_path: ssmpretrain.datamodules.ImageShards\n"
        "  init_args: {train: good/train-000000.tar, val: good/train-000000.tar, image_size: 32, batch_size: 4,"
        " num_workers: 0}\n"
        "trainer: {accelerator: cpu, devices: 1, max_epochs: 1, num_sanity_val_steps: 0}\n"
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and our own lines of standard error."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if line.startswith("ssmpretrain: "))


def html_shard(folder: Path) -> list[str]:
    (folder / "page.tar").write_text("<!DOCTYPE html><html><body>404</body></html>" * 40)
    return ["--data.train", "page.tar"]


def no_image_inside(folder: Path) -> list[str]:
    with tarfile.open(folder / "text.tar", "w") as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"hi"))
    return ["--data.train", "text.tar"]


def broken_images(folder: Path) -> list[str]:
    with tarfile.open(folder / "broken.tar", "w") as tar:
        for i in range(4):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 9
            tar.addfile(member, io.BytesIO(b"\xff\xd8 broken"))
    return ["--data.train", "broken.tar", "--data.batch_size", "2"]


def broken_late(folder: Path) -> list[str]:
    """Images that break after those that the start looks at, so that a loader worker meets them."""
    with tarfile.open(folder / "good" / "train-000000.tar") as tar:
        png = tar.extractfile("0000.png").read()
    with tarfile.open(folder / "late.tar", "w") as tar:
        for i in range(80):
            content = png if i < 30 else b"\x89PNG broken"
            member = tarfile.TarInfo(f"{i:04d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return ["--data.train", "late.tar", "--data.num_workers", "2"]


def gap(folder: Path) -> list[str]:
    (folder / "gap").mkdir()
    for i in (0, 1, 3):
        shutil.copy(folder / "good" / "train-000000.tar", folder / "gap" / f"t-{i:03d}.tar")
    return ["--data.train", "gap/t-{000..003}.tar"]


def empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return ["--data", "ssmpretrain.datamodules.ImageFolder", "--data.train", "empty"]


def recipe_line(line: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        text = (folder / "recipe.yaml").read_text().replace("decoder_embed_dim: 32", line)
        (folder / "recipe.yaml").write_text(text)
        return []

    return make


def truncated_checkpoint(folder: Path) -> list[str]:
    torch.save({"state_dict": {"w": torch.zeros(10_000)}}, folder / "cut.ckpt")
    content = (folder / "cut.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    return ["--ckpt_path", "cut.ckpt"]


def checkpoint_of_another_variant(folder: Path) -> list[str]:
    encoder = {"name": "vim_tiny_patch16_224", "args": {}}
    torch.save({"state_dict": {}, "loops": {}, "encoder": encoder}, folder / "tiny.ckpt")
    return ["--ckpt_path", "tiny.ckpt"]


def file_as_run_folder(folder: Path) -> list[str]:
    (folder / "taken").write_text("")
    return ["--run_dir", "taken"]


def words(*given: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(given)


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "missing data": (words("--data.train", "nowhere/x.tar"), ["nowhere/x.tar"]),
    "empty image folder": (empty_folder, ["empty", "image"]),
    "gap in the shards": (gap, ["002"]),
    "HTML page as shard": (html_shard, ["page.tar", "web page"]),
    "no image in the shard": (no_image_inside, ["text.tar"]),
    "only broken images": (broken_images, ["broken.tar"]),
    "broken images met by a worker": (broken_late, ["late.tar", "undecodable", "max_bad_fraction"]),
    "image size": (words("--data.image_size", "33"), ["33", "32"]),
    "unknown key in the recipe": (recipe_line("decoder_embed_dmi: 32"), ["recipe.yaml:3", "decoder_embed_dim"]),
    "unknown nested key": (recipe_line("optimizer: {lr_per_265: 1.0}"), ["recipe.yaml:3", "lr_per_256"]),
    "unknown option": (words("--trainer.max_epohcs", "3"), ["max_epochs"]),
    "abbreviated option": (words("--model.optimizer.lr", "1"), ["lr_per_256"]),
    "broken YAML": (recipe_line("decoder_embed_dim: [32"), ["recipe.yaml", "not valid YAML"]),
    "unknown precision": (words("--trainer.precision", "foo"), ["bf16-mixed", "foo"]),
    "wrong type": (words("--model.mask_ratio", "lots"), ["mask_ratio", "lots"]),
    "mask ratio": (words("--model.mask_ratio", "1.2"), ["mask_ratio", "1.2", "(0, 1)"]),
    "unknown encoder": (words("--model.encoder", "vim_tini_patch16_224"), ["vim_tiny_patch16_224"]),
    "encoder argument": (words("--model.encoder_args", '{"dept": 3}'), ["depth"]),
    "negative learning rate": (words("--model.optimizer.lr_per_256", "-1"), ["lr_per_256", "-1"]),
    "unknown class": (words("--model", "ssmpretrain.objectives.MEA"), ["MAE"]),
    "truncated checkpoint": (truncated_checkpoint, ["cut.ckpt"]),
    "missing checkpoint": (words("--ckpt_path", "gone.ckpt"), ["gone.ckpt"]),
    "a word of Lightning's": (words("--ckpt_path", "best"), ["ckpt_path: a checkpoint file, or last", "got best"]),
    "another variant": (checkpoint_of_another_variant, ["tiny.ckpt", "vim_tiny_patch16_224", "test_vim"]),
    "run folder is a file": (file_as_run_folder, ["taken"]),
    "unwritable run folder": (words("--run_dir", "/proc/run"), ["/proc/run"]),
    "batch larger than the data": (words("--data.batch_size", "100"), ["100", "8"]),
    "no GPU": (words("--trainer.accelerator", "gpu"), ["--trainer.accelerator cpu"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_short_message_and_exit_code_2(
    mistake: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = MISTAKES[mistake]
    code, _, message = run(capsys, "fit", "--config", "recipe.yaml", *make(folder))
    assert code == 2
    assert message.count("\n") <= 2 and len(message) < 700
    for part in expected:
        assert part in message
    assert "Traceback" not in message


def test_fit_leaves_a_run_folder_that_the_same_command_goes_on_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, message = run(capsys, "fit", "--config", "recipe.yaml")
    assert (code, message) == (0, "")
    run_folder = folder / "runs" / "recipe"
    assert "runs/recipe/checkpoints/last.ckpt" in out
    for file in ("config.yaml", "metrics.jsonl", "environment.txt", "checkpoints/last.ckpt", "plots/loss.png"):
        assert (run_folder / file).is_file(), file
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in row for row in rows)

    longer = ["--trainer.max_epochs", "2"]
    code, _, message = run(capsys, "fit", "--config", "recipe.yaml", *longer)
    assert code == 2 and "configuration" in message
    code, _, _ = run(capsys, "fit", "--config", "recipe.yaml", "--ckpt_path", "last", *longer, "--allow_changes")
    assert code == 0
    assert torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    assert os.readlink(run_folder / "checkpoints" / "last.ckpt") == "step-000000004.ckpt"
    code, _, message = run(capsys, "fit", "--config", "recipe.yaml", "--fresh", "--ckpt_path", "last")
    assert code == 2 and "Leave one of them out" in message
    code, _, _ = run(capsys, "fit", "--config", "recipe.yaml", "--fresh")
    assert code == 0 and (folder / "runs" / "recipe.1" / "checkpoints" / "last.ckpt").is_file()
    assert (run_folder / "environment.txt").read_text().count("started ") == 1

    code, out, _ = run(capsys, "validate", "--config", "recipe.yaml", "--ckpt_path", "last")
    assert code == 0


def test_fresh_is_for_the_first_start_and_not_for_those_of_the_scheduler(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", "--config", "recipe.yaml", "--fresh"]
    assert main(command) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == 0
    assert "runs/recipe is complete" in caplog.text and not (folder / "runs" / "recipe.1").exists()


def test_the_encoder_of_a_run_loads_with_its_weights_or_their_average(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
    faster = ["--model.optimizer.lr_per_256", "0.1", "--model.schedule.warmup_epochs", "0"]
    code, _, message = run(capsys, "fit", "--config", "recipe.yaml", average, *faster)
    assert (code, message) == (0, "")
    path = folder / "runs" / "recipe" / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    trained, averaged = ssmpretrain.load_encoder(path, ema=False), ssmpretrain.load_encoder(path)
    name = "layers.0.mixer.in_proj.weight"
    assert torch.equal(averaged.state_dict()[name], saved["state_dict"][f"encoder.{name}"])
    assert torch.equal(trained.state_dict()[name], saved["current_model_state"][f"encoder.{name}"])
    assert not torch.equal(trained.state_dict()[name], averaged.state_dict()[name])
    assert averaged(torch.zeros(1, 3, 32, 32)).shape == (1, averaged.num_features)


def finetuned(capsys: pytest.CaptureFixture[str], *words: str, command: str = "fit") -> tuple[int, str, str]:
    """Run the recipe of the folder with the model of the words."""
    recipe = Path("finetune.yaml")
    if not recipe.exists():
        text = Path("recipe.yaml").read_text().replace("MAE", "Finetune")
        recipe.write_text(text.replace("decoder_embed_dim: 32", "num_classes: 2, layer_decay: 0.5, mixup: 0.8"))
    return run(capsys, command, "--config", "finetune.yaml", *words)


def test_fine_tuning_takes_a_run_and_is_continued_validated_and_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "fit", "--config", "recipe.yaml")[0] == 0
    words = ["--model.encoder", "null", "--model.init_from", "runs/recipe", "--model.schedule.warmup_epochs", "0"]
    words += ["--trainer.callbacks+=ssmpretrain.callbacks.EMA", "--trainer.callbacks.decay=0.5"]
    code, out, message = finetuned(capsys, *words)
    assert (code, message) == (0, "") and "\ntop-1 " in out and "\nEMA top-1 " in out and "\nEMA top-5 " in out
    assert (
        "reported        val/NAME_ema, the average of the weights; load_encoder, init_from and export take these" in out
    )
    groups = (folder / "runs" / "finetune" / "parameter_groups.txt").read_text()
    assert "encoder.patch_embed.proj.weight" in groups and " 0.125 " in groups  # two pairs of blocks below the head

    code, out, message = finetuned(capsys, *words, "--trainer.max_epochs", "2", "--allow_changes")
    assert (code, message) == (0, "")
    checkpoint = folder / "runs" / "finetune" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 1 and saved["encoder"]["name"] == "test_vim"
    code, out, message = finetuned(capsys, *words, "--ckpt_path", "last", command="validate")
    assert (code, message) == (0, "") and "val/top1 " in out and "val/top1_ema " in out
    assert ssmpretrain.load_encoder(folder / "runs" / "finetune")(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_a_run_is_not_continued_with_other_classes_or_without_its_average(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = "--trainer.callbacks+=ssmpretrain.callbacks.EMA"
    assert finetuned(capsys, average)[0] == 0
    code, _, message = finetuned(capsys, average, "--ckpt_path", "last", "--model.num_classes", "5")
    assert code == 2 and "of 2 classes, the recipe asks for 5" in message and "init_from" in message
    code, _, message = finetuned(capsys, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert code == 2 and "ssmpretrain.callbacks.EMA" in message


def test_training_goes_without_validation_data_and_without_labels(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folder / "images"
    images.mkdir()
    for i in range(8):
        pixels = torch.full((32, 32, 3), 30 * i, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{i}.png")
    words = ["--data", "ssmpretrain.datamodules.ImageFolder", "--data.train", "images", "--data.val", "null"]
    code, out, message = run(capsys, "fit", "--config", "recipe.yaml", *words)
    assert (code, message) == (0, "") and "train loss" in out
    assert (folder / "runs" / "recipe" / "checkpoints" / "last.ckpt").is_file()


def test_a_finished_run_is_validated_and_left_as_it_is_even_when_what_it_began_with_is_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "recipe.yaml", "--run_dir", "runs/mae"]) == 0
    recipe = (folder / "recipe.yaml").read_text()
    model = "class_path: ssmpretrain.objectives.Finetune\n  init_args: {init_from: runs/mae, num_classes: 5}\n"
    (folder / "tune.yaml").write_text("model:\n  " + model + recipe[recipe.index("data:") :])
    assert main(["fit", "--config", "tune.yaml"]) == 0
    shutil.rmtree(folder / "runs/mae")
    run_folder = folder / "runs/tune"
    before = {name: (run_folder / name).read_text() for name in ("config.yaml", "metrics.jsonl")}
    last = ["--config", "runs/tune/config.yaml", "--run_dir", "runs/tune", "--ckpt_path", "last"]
    assert main(["validate", *last, "--data.batch_size", "2"]) == 0
    assert {name: (run_folder / name).read_text() for name in before} == before
    assert main(["fit", *last, "--trainer.max_epochs", "2", "--allow_changes"]) == 0
    assert torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_a_run_goes_on_though_the_source_of_its_text_tower_is_gone(folder: Path) -> None:
    with ShardWriter(folder / "pairs", "train") as writer:
        for number in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(picture, "PNG")
            writer.write(f"{number}", {"png": picture.getvalue(), "txt": f"{number} apples".encode()})
    text = "{width: 32, heads: 4, layers: 1, context_length: 8, init_from: %s, locked: %s}"
    for name, source, locked in (("first", "null", "false"), ("second", "runs/first", "true")):
        (folder / f"{name}.yaml").write_text(
            "model:\n  class_path: ssmpretrain.objectives.CLIP\n"
            f"  init_args: {{encoder: test_vim, embed_dim: 16, text: {text % (source, locked)}}}\n"
            "data:\n  class_path: ssmpretrain.datamodules.ImageTextShards\n"
            "  init_args: {train: pairs, image_size: 32, batch_size: 4, num_workers: 0}\n"
            "trainer: {accelerator: cpu, devices: 1, max_epochs: 1}\n"
        )
        assert main(["fit", "--config", f"{name}.yaml"]) == 0
    states = [torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("first", "second")]
    shutil.rmtree(folder / "runs/first")
    assert main(["fit", "--config", "second.yaml", "--trainer.max_epochs", "2", "--allow_changes"]) == 0
    states.append(torch.load("runs/second/checkpoints/last.ckpt", weights_only=True))
    assert [state["epoch"] for state in states] == [0, 0, 1]
    first, *later = ({key: value for key, value in state["state_dict"].items() if "text." in key} for state in states)
    assert all(torch.equal(tensor, state[key]) for state in later for key, tensor in first.items())


def test_a_recipe_for_several_nodes_waits_for_nobody(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "fit", "--config", "recipe.yaml", "--trainer.num_nodes", "2")
    assert code == 2 and "no launcher" in err and "--trainer.num_nodes 1" in err


def test_every_epoch_is_saved_also_those_without_a_validation(folder: Path) -> None:
    words = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "3"]
    assert main(["fit", "--config", "recipe.yaml", *words]) == 0
    assert torch.load(folder / "runs/recipe/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_divergence_exits_1_and_keeps_the_last_good_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, message = run(
        capsys, "fit", "--config", "recipe.yaml", "--trainer.max_epochs", "20",
        "--model.optimizer.lr_per_256", "1e38", "--model.schedule.warmup_epochs", "4",
    )  # fmt: skip
    assert code == 1 and "lr_per_256" in message
    saved = folder / "runs" / "recipe" / "checkpoints" / "last.ckpt"
    if saved.exists():
        weights = torch.load(saved, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = run(capsys, "fti")
    assert code == 2 and "'fit'" in message


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipes")
    assert code == 0 and "mae_vim_b" in out and "quickstart" in out
    code, out, _ = run(capsys, "recipes", "mae_vim_b")
    assert code == 0 and "lr_per_256: 1.5e-4" in out
    code, _, message = run(capsys, "recipes", "mae_vim_x")
    assert code == 2 and "mae_vim_" in message and len(message) < 200


def test_missing_recipe_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = run(capsys, "fit", "--config", "recipes/mae_vim_z.yaml")
    assert code == 2 and "recipes/mae_vim_z.yaml" in message


def test_the_module_runs_as_a_program_and_starts_without_torch() -> None:
    code = "import sys, runpy\nsys.argv = ['ssmpretrain', '--version']\n"
    code += "try: runpy.run_module('ssmpretrain', run_name='__main__')\nexcept SystemExit as e: assert e.code == 0\n"
    code += "assert not {'torch', 'lightning', 'webdataset', 'timm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ssmpretrain 0.")


def test_the_demo_ends_with_what_pretraining_was_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    few = "--trainer.max_epochs 1 --data.train_images 128 --data.val_images 64 --data.num_workers 0"
    code, out, message = run(capsys, "demo", *few.split())
    assert (code, message) == (0, "")
    for row in ("raw pixels", "untrained encoder", "pretrained encoder"):
        assert f"\n{row}" in out
    for picture in ("loss.png", "neighbours.png", "pca.png"):
        assert f"\n  runs/quickstart/plots/{picture}\n" in out
        assert Path("runs/quickstart/plots", picture).read_bytes().startswith(b"\x89PNG")


def contents(folder: Path) -> dict[Path, bytes]:
    """The files below a folder; of the lock of a run its presence alone."""
    return {path: b"" if path.name == ".lock" else path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_validate_takes_the_runs_last_usable_checkpoint_says_which_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def validated(*words: str) -> str:
        caplog.clear()
        code, out, err = run(capsys, "validate", *words)
        assert (code, err) == (0, "")
        return next(line for line in out.splitlines() if line.startswith("validation  val/loss"))

    draw = ["--trainer.callbacks+=ssmpretrain.callbacks.Reconstructions"]
    untrained = validated("--config", "recipe.yaml")
    assert "runs/recipe: no checkpoint of this run is used; the weights are untrained." in caplog.text
    assert not Path("runs").exists()

    train = [
        "--trainer.max_epochs",
        "2",
        "--trainer.check_val_every_n_epoch",
        "2",
        "--model.optimizer.lr_per_256",
        "0.1",
    ]
    assert main(["fit", "--config", "recipe.yaml", "--run_dir", "runs/first", *train, *draw]) == 0
    Path("runs/first").rename("runs/moved")  # its config.yaml still says runs/first
    before = contents(Path("runs"))
    trained = validated("--config", "runs/moved/config.yaml")
    assert "validating the weights of runs/moved/checkpoints/step-000000004.ckpt, step 4, epoch 2" in caplog.text
    assert trained != untrained == validated("--config", "runs/moved/config.yaml", "--fresh")
    assert run(capsys, "validate", "--config", "recipe.yaml", "--data.val", "null")[0] == 2
    assert "the weights are untrained" in caplog.text
    assert trained == validated("--config", "recipe.yaml", "--run_dir", "runs/moved", *draw)
    assert trained == validated("--config", "recipe.yaml", "--ckpt_path", "runs/moved/checkpoints/last.ckpt")
    assert contents(Path("runs")) == before

    words = ["--model.encoder", "null", "--model.init_from", "runs/moved"]
    assert finetuned(capsys, *words, command="validate")[::2] == (0, "")
    assert "the weights are those that training would start with: of runs/moved, else untrained" in caplog.text

    (folder / "runs/moved/checkpoints/step-000000004.ckpt").write_bytes(b"half")
    assert validated("--config", "runs/moved/config.yaml") not in (trained, untrained)
    assert "step-000000004.ckpt cannot be used: short" in caplog.text and "step-000000002.ckpt, step 2" in caplog.text


@pytest.mark.parametrize(("name", "ours"), [("val/loss", True), ("data/bad_samples", True), ("train/of_a_user", False)])
def test_lightnings_advice_on_sync_dist_is_kept_for_what_is_not_summed_over_ranks_already(
    name: str, ours: bool
) -> None:
    advice = f"It is recommended to use `self.log({name!r}, ..., sync_dist=True)` when logging on epoch level"
    assert any(re.match(message, advice) for message in NOISE) == ours


def test_a_stray_image_in_the_validation_folder_is_refused_before_a_step_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/a/0", "train/a/1", "train/b/2", "train/b/3", "val/a/0", "val/stray"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    images = ["--data", "ssmpretrain.datamodules.ImageFolder", "--data.train", "train", "--data.val", "val"]
    code, out, message = finetuned(capsys, *images)
    assert code == 2 and "step" not in out
    assert message.endswith(
        "labels are from 0 to 1; got none of stray.png (val). Label the data, leave it out, or skip it with "
        "data.require_labels true."
    )
    assert finetuned(capsys, *images, "--data.require_labels", "true")[0] == 0
