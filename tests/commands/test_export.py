"""`ssmpretrain export` from its command line."""

import re
from pathlib import Path

import pytest
import timm
import torch

import ssmpretrain
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.cli import main
from ssmpretrain.objectives import MAE

ARGS = {"img_size": 64, "class_token": "head", "drop_path_rate": 0.1}


def checkpoint(average: float | None = None) -> dict:
    """What a run saves; with an average, one whose moving average has this in its first norm."""
    torch.manual_seed(0)
    model = MAE(encoder="test_vim", encoder_args=ARGS, decoder_embed_dim=32, decoder_depth=1)
    content = {"state_dict": model.state_dict(), "loops": {}}
    model.on_save_checkpoint(content)
    if average is not None:
        content["current_model_state"] = dict(content["state_dict"])
        content["state_dict"]["encoder.norm_f.weight"] = torch.full((32,), average)
    return content


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/mae")
    folder.prepare()
    torch.save(checkpoint(), folder.last_checkpoint)
    return folder


def export(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and what was printed, on either stream."""
    capsys.readouterr()
    code = main(["export", *words])
    return code, "".join(capsys.readouterr())


def encoder_of(content: dict) -> dict[str, torch.Tensor]:
    state = content["state_dict"].items()
    return {name.removeprefix("encoder."): tensor for name, tensor in state if name.startswith("encoder.")}


@pytest.mark.parametrize(
    ("out", "format"), [("out/vim.safetensors", "safetensors"), ("out/vim", "timm"), ("out/vim.pth", "official")]
)
def test_a_run_is_exported_and_the_line_printed_reads_it(run_folder, capsys, out, format):
    code, printed = export(capsys, "runs/mae", out, "--format", format)
    assert code == 0
    loaded, wrote, read = printed.splitlines()
    assert loaded.startswith(
        "loaded test_vim from runs/mae/checkpoints/last.ckpt (state_dict): 73 of 73 tensors loaded"
    )
    assert wrote.startswith(f"wrote test_vim to {out} ({format}): 73 tensors, ")
    model = ssmpretrain.create_encoder("test_vim", num_classes=0, **ARGS)
    line = read.removeprefix("read it with  ").split("  (")[0]
    answer = eval(line, {"torch": torch, "timm": timm, "ssmpretrain": ssmpretrain, "model": model})
    back = model if format == "official" else answer
    assert back.patch_embed.img_size == (64, 64)
    assert back.class_token == "head"
    written = encoder_of(torch.load(run_folder.last_checkpoint, weights_only=True))
    assert written.keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in back.state_dict().items())


def test_a_program_is_exported_for_the_size_asked_for(run_folder, capsys):
    code, printed = export(capsys, "runs/mae", "vim.pt2", "--format", "torch_export", "--image-size", "32x48")
    assert code == 0
    _, wrote, read = printed.splitlines()
    assert re.search(r"wrote test_vim to vim\.pt2 \(torch_export\): .*; differs by \S+ of the largest number$", wrote)
    program = eval(read.removeprefix("read it with  ").split("  (")[0], {"torch": torch})
    assert program(torch.randn(4, 3, 32, 48)).shape == (4, 32)


def test_safetensors_is_the_format_without_a_word(run_folder, capsys):
    assert export(capsys, str(run_folder.last_checkpoint), "vim.safetensors")[0] == 0
    assert ssmpretrain.load_encoder("vim.safetensors").load_report.total == 73


@pytest.mark.parametrize(("flags", "average"), [((), True), (("--ema",), True), (("--no-ema",), False)])
def test_the_average_or_the_weights_in_training_are_taken(run_folder, capsys, flags, average):
    torch.save(checkpoint(average=7.0), run_folder.last_checkpoint)
    assert export(capsys, "runs/mae", "vim.safetensors", *flags)[0] == 0
    assert ssmpretrain.load_encoder("vim.safetensors").norm_f.weight[0] == (7.0 if average else 1.0)


@pytest.mark.parametrize(("flags", "teacher"), [((), True), (("--teacher",), True), (("--no-teacher",), False)])
def test_the_teacher_or_the_student_is_taken(run_folder, capsys, flags, teacher):
    content = checkpoint()
    own = {name: value for name, value in content["state_dict"].items() if name.startswith("encoder.")}
    content["state_dict"] |= {f"teacher.{name}": torch.full_like(value, 7.0) for name, value in own.items()}
    torch.save({**content, "reported": "teacher"}, run_folder.last_checkpoint)
    code, printed = export(capsys, "runs/mae", "vim.safetensors", *flags)
    assert code == 0 and f"weights of the {'teacher' if teacher else 'student'}" in printed
    assert ssmpretrain.load_encoder("vim.safetensors").norm_f.weight[0] == (7.0 if teacher else 1.0)


def as_it_is(folder: RunFolder) -> None:
    """A run without an average, whole."""


def cut_short(folder: RunFolder) -> None:
    content = folder.last_checkpoint.read_bytes()
    folder.last_checkpoint.write_bytes(content[: len(content) // 2])


def no_checkpoint_yet(folder: RunFolder) -> None:
    folder.last_checkpoint.unlink()


def no_encoder(folder: RunFolder) -> None:
    torch.save({"state_dict": {"head.weight": torch.ones(1)}, "loops": {}}, folder.last_checkpoint)


def taken(folder: RunFolder) -> None:
    Path("vim.safetensors").write_text("precious")


def of_timm(folder: RunFolder) -> None:
    model = ssmpretrain.create_encoder("test_mambaout", num_classes=0)
    torch.save({"state_dict": model.state_dict(), "encoder": {"name": "test_mambaout"}}, folder.last_checkpoint)


@pytest.mark.parametrize(
    ("break_it", "words", "message"),
    [
        (as_it_is, ["--ema"], "runs/mae/checkpoints/last.ckpt has no averaged weights, only state_dict."),
        (as_it_is, ["--teacher"], "runs/mae/checkpoints/last.ckpt holds no teacher beside its weights."),
        (
            as_it_is,
            ["--teacher", "--format", "open_clip"],
            "--teacher is for runs with a teacher, such as DINO; got it",
        ),
        (cut_short, [], "is no checkpoint, or a truncated or damaged one"),
        (no_checkpoint_yet, [], "got the folder runs/mae. It holds no checkpoint."),
        (no_encoder, [], "or too little of one to recognise"),
        (taken, [], "vim.safetensors exists, and nothing is overwritten."),
        (of_timm, ["--format", "official"], "format official is a file that ends in .pth"),
        (as_it_is, ["--format", "zip"], "invalid choice: 'zip'"),
        (
            as_it_is,
            ["--image-size", "32"],
            "img_size is an argument of torch_export and onnx only; got 32 for safetensors.",
        ),
        (as_it_is, ["--image-size", "wide"], "invalid pixels value: 'wide'"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_exit_code_2(run_folder, capsys, break_it, words, message):
    break_it(run_folder)
    code, printed = export(capsys, "runs/mae", "vim.safetensors", *words)
    assert code == 2
    assert len(printed.splitlines()) == 1
    assert printed.startswith("ssmpretrain: ")
    assert message in printed
    assert {path.name for path in Path().iterdir()} <= {"runs", "vim.safetensors"}
    assert break_it is taken or not Path("vim.safetensors").exists()
