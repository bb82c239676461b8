"""Options of the Trainer, of Lightning's callbacks and of this package: each has its effect, or is refused."""

import dataclasses
import inspect
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.callbacks import LambdaCallback, ModelPruning, StochasticWeightAveraging

from ssmpretrain import datamodules, objectives
from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.cli import main
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.order.loader import PlanSampler
from ssmpretrain.datamodules.order.plan import Stage
from ssmpretrain.encoders import create_encoder
from ssmpretrain.objectives import MAE, Finetune, SimMIM
from ssmpretrain.run.options.trainer_options import BASE_CALLBACKS, REFUSED_CALLBACKS, check_callbacks, check_options
from ssmpretrain.run.trainer_cli import TrainerCLI
from ssmpretrain.training.checkpoints.saving import Checkpoints
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.lars import LARS
from ssmpretrain.training.optim.schedules import Cosine
from ssmpretrain.training.stopping.preemption import Preemption

HOSTILE = ["0", "-1", "1" + 20 * "0", ".nan", ".inf", "", "null", "lots", "[1]", "0.5"]
# Those that an option of the Trainer takes: they do what they say. All other options take null alone.
HOLDS = {
    "default_root_dir": HOSTILE, "model_registry": HOSTILE,  # with a word that they have no effect
    "limit_train_batches": ["null", "0.5"], "limit_val_batches": ["0", "null", "0.5"], "overfit_batches": ["0", "0.5"],
    "limit_test_batches": ["0", "null", "0.5"], "limit_predict_batches": ["0", "null", "0.5"],
    "max_epochs": ["0", "-1", "null"], "max_steps": ["0", "-1"], "min_epochs": ["0", "null"],
    "min_steps": ["0", "null"],
    "val_check_interval": ["null", "0.5"], "num_sanity_val_steps": ["0", "-1", "null"],
    "gradient_clip_val": ["0", "null", "0.5"], "fast_dev_run": ["0"], "reload_dataloaders_every_n_epochs": ["0"],
    "accelerator": [], "strategy": [], "devices": [], "num_nodes": [], "accumulate_grad_batches": [],
    "inference_mode": [], "barebones": [], "use_distributed_sampler": [], "detect_anomaly": [], "sync_batchnorm": [],
    "enable_autolog_hparams": [],
}  # fmt: skip
# Numbers that are judged without the parser, which knows the types alone.
NUMBERS = [0, -1, 10**20, math.nan, math.inf, -math.inf, 0.5]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]) -> Path:
    """A working folder with one shard and a recipe that trains on it in a second."""
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "train.tar", captions=True)
    (tmp_path / "recipe.yaml").write_text(
        "model: {class_path: ssmpretrain.objectives.MAE, init_args: {encoder: test_vim, decoder_embed_dim: 32}}\n"
        "data:\n  class_path: ssmpretrain.datamodules.ImageShards\n"
        "  init_args: {train: train.tar, val: train.tar, image_size: 32, batch_size: 4, num_workers: 0}\n"
        "trainer: {accelerator: cpu, devices: 1, max_epochs: 1, num_sanity_val_steps: 0}\n"
    )
    return tmp_path


def fit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return the exit code, and the lines of this package on standard error."""
    capsys.readouterr()
    code = main(["fit", "--config", "recipe.yaml", *words])
    return code, "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("ssmpretrain: "))


def holds_or_is_refused(holds: bool, option: str, code: int, message: str) -> None:
    assert code == (0 if holds else 2), f"{option}: {message}"
    if not holds:
        assert option.split(".")[-1] in message and len(message) < 400, message
        assert message.count("\n") == 0 and message.count(": ") >= 2, message
        assert "; got " in message or "Correct the options of the trainer" in message, (
            message
        )  # the latter are Lightning's


def test_the_table_has_every_option_that_is_a_number() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    refused: dict[str, list[float]] = {name: [] for name in defaults}
    for name in defaults:
        for value in NUMBERS:
            try:
                check_options({**defaults, name: value})
            except ValueError as error:
                refused[name].append(value)
                assert name in str(error) and "; got " in str(error)
    for name, least in {"num_nodes": 1, "max_epochs": -1, "max_steps": -1, "accumulate_grad_batches": 1,
                        "check_val_every_n_epoch": 1, "log_every_n_steps": 1, "gradient_clip_val": 0, "devices": 1,
                        "limit_train_batches": 0.1, "val_check_interval": 0.1, "overfit_batches": 0,
                        }.items():  # fmt: skip
        wrong = [value for value in NUMBERS if not least <= value <= 10**12 and (name, value) != ("devices", -1)]
        assert {str(value) for value in wrong} <= {str(value) for value in refused[name]}, name


@pytest.mark.parametrize(
    "word",
    [
        "--trainer.strategy=lots", "--trainer.accelerator=", "--trainer.devices=1.5", "--trainer.devices=100000",
        "--trainer.val_check_interval=lots", "--trainer.max_time=00:00:00:00", "--seed_everything=-1",
        "--rank_timeout=0", "--model=os.system", "--model=", "--trainer.logger=0", "--data.num_workers=100000",
        "--data.image_size=1000000", "--model.encoder=", "--model.encoder_args.depth=lots", "--data.std=[.inf,1,1]",
    ],
)  # fmt: skip
def test_a_wrong_value_on_the_command_line_is_refused_in_one_line(
    word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = fit(capsys, word)
    holds_or_is_refused(False, word.partition("=")[0].strip("-"), code, message)
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", inspect.signature(Trainer).parameters)
def test_every_option_of_the_trainer_takes_or_refuses_every_value(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainerCLI, "fit", lambda self, model, **given: None)
    for value in HOSTILE:
        code, message = fit(capsys, f"--trainer.{option}={value}")
        holds_or_is_refused(value in HOLDS.get(option, ["null"]), f"trainer.{option}", code, message)


NOT_FINITE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "AdamW.lr_per_256": (AdamW, {"lr_per_256": 1}),
    "AdamW.weight_decay": (AdamW, {"weight_decay": 1}),
    "AdamW.eps": (AdamW, {"eps": 1}),
    "AdamW.betas": (AdamW, {"betas": (0.9, 1)}),
    "Cosine.warmup_epochs": (Cosine, {"warmup_epochs": 1}),
    "Cosine.final_fraction": (Cosine, {"final_fraction": 1}),
    "LARS.weight_decay": (LARS, {"weight_decay": 1}),
    "LARS.trust_coefficient": (LARS, {"trust_coefficient": 1}),
    "LARS.momentum": (LARS, {"momentum": 1}),
    "EMA.decay": (EMA, {"decay": 1}),
    "Checkpoints.every_n_minutes": (Checkpoints, {"every_n_minutes": 1}),
    "Checkpoints.every_n_epochs": (Checkpoints, {"every_n_epochs": 1}),
    "Preemption.max_time": (Preemption, {"max_time": {"minutes": 1}}),
    **{
        f"ImageShards.{name}": (ImageShards, {"train": "x.tar", name: value})
        for name, value in {"mean": (1, 0, 0), "std": (1, 1, 1), "color_jitter": 1, "random_erasing": 1,
                            "max_bad_fraction": 1, "eval_crop_ratio": 1, "crop_scale": (1, 1)}.items()
    },
    **{
        f"Finetune.{name}": (Finetune, {"encoder": "test_vim", "num_classes": 2, name: 1})
        for name in ("layer_decay", "head_init_std", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob",
                     "label_smoothing")
    },
    "MAE.mask_ratio": (MAE, {"encoder": "test_vim", "mask_ratio": 1}),
    "SimMIM.mask_ratio": (SimMIM, {"encoder": "test_vim", "mask_ratio": 1}),
    **{
        f"Vim.{name}": (create_encoder, {"name": "test_vim", name: 1})
        for name in ("expand", "drop_path_rate", "drop_rate", "flip_probability")
    },
    **{
        f"VMamba.{name}": (create_encoder, {"name": "test_vmamba", name: 1})
        for name in ("ssm_ratio", "mlp_ratio", "drop_path_rate", "drop_rate")
    },
}  # fmt: skip


def test_no_class_takes_a_number_that_is_not_finite() -> None:
    answers = {}
    for argument, (build, given) in NOT_FINITE.items():
        name = argument.partition(".")[2]
        value = given[name]
        for number in (math.nan, math.inf, -math.inf):
            one = {"minutes": number} if name == "max_time" else number
            wrong = (number, *value[1:]) if isinstance(value, tuple) else one
            try:
                build(**{**given, name: wrong})
            except ValueError as error:
                answers[argument, number] = name in str(error)
            else:
                answers[argument, number] = False
    assert len(answers) == 3 * len(NOT_FINITE) and [case for case, refused in answers.items() if not refused] == []


# Callbacks

TRIED = {
    "DeviceStatsMonitor": {},  # psutil is missing
    "EarlyStopping": {"monitor": "val/loss"},
    "LambdaCallback": {},
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"monitor": "val/loss"},
    "ModelSummary": {},
    "OnExceptionCheckpoint": {"dirpath": "broken"},
    "RichModelSummary": {},  # rich is missing
    "RichProgressBar": {},
    "SpikeDetection": {},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "Timer": {"duration": "00:01:00:00"},
    "TQDMProgressBar": {},
    "EMAWeightAveraging": {},
    "WeightAveraging": {},
}


def test_every_callback_of_lightning_is_tried_or_refused() -> None:
    known = {*TRIED, *REFUSED_CALLBACKS, *BASE_CALLBACKS}
    assert set(callbacks.__all__) == known


def test_refused_callbacks_say_why_and_what_to_do() -> None:
    class Later(StochasticWeightAveraging):
        pass

    for callback in (Later(1e-3), ModelPruning("l1_unstructured")):
        with pytest.raises(ValueError, match=r"trainer\.callbacks: \w+ is not taken: .+\. \w+ .+\."):
            check_callbacks([callback])
    with pytest.raises(ValueError, match="base class"):
        check_callbacks([callbacks.Checkpoint()])
    check_callbacks([LambdaCallback(), EMA(), Checkpoints()])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_callback_of_lightning_runs_or_names_the_package_that_it_needs(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--trainer.callbacks.{option}={value}" for option, value in TRIED[name].items()]
    code, message = fit(capsys, f"--trainer.callbacks={name}", *options)
    if code == 2:
        assert "pip install" in message and name in message and "Traceback" not in message
    else:
        assert (code, message) == (0, "")
        assert (folder / "runs" / "recipe" / "checkpoints" / "last.ckpt").exists()


FLAGS = {
    "overfit_batches": ["2", "0.5"], "fast_dev_run": ["1", "2"], "detect_anomaly": ["true"],
    "inference_mode": ["false"], "profiler": ["simple", "advanced"],
    "reload_dataloaders_every_n_epochs": ["1"], "sync_batchnorm": ["true"],
    "use_distributed_sampler": ["false"], "benchmark": ["true"], "deterministic": ["warn"],
    "enable_checkpointing": ["false"], "enable_progress_bar": ["false"], "enable_model_summary": ["true"],
    "val_check_interval": ["1", "0.5", "00:00:00:01"], "limit_train_batches": ["1", "0.5"], "limit_val_batches": ["0"],
    "precision": ["bf16-mixed", "16-mixed"], "logger": ["false", "true"], "max_steps": ["1"], "devices": ["auto"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in FLAGS.items() for value in values])
def test_a_flag_of_the_trainer_trains(flag: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(capsys, f"--trainer.{flag}={value}", "--trainer.max_epochs=2") == (0, "")


# What had failed


def test_overfitting_a_few_batches_trains_on_the_same_ones(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], float]] = []
    step = MAE.training_step

    def watched(self: MAE, batch: Any, batch_idx: int) -> Any:
        seen.append((batch["key"], float(batch["image"].sum())))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MAE, "training_step", watched)
    options = ["--data.batch_size=2", "--trainer.max_epochs=3"]
    assert fit(capsys, "--trainer.overfit_batches=2", *options) == (0, "")
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:]
    assert seen[0] != seen[1]


def test_samples_are_counted_over_all_epochs_where_each_has_a_loader_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(capsys, "--trainer.reload_dataloaders_every_n_epochs=1", "--trainer.max_epochs=3") == (0, "")
    checkpoint = torch.load("runs/recipe/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["ImageShards"]["samples"] == 3 * 8


def test_a_sampler_can_ask_for_the_same_batches_every_epoch() -> None:
    sampler = PlanSampler(lambda epoch, stages: 2, Stage(1, 4, 1), 0, same=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert [key.epoch for key in sampler] == [0, 0]


def test_a_progress_bar_that_is_chosen_takes_the_place_of_ours(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(capsys, "--trainer.callbacks=TQDMProgressBar", "--trainer.max_steps=1") == (0, "")


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "WandbLogger"])
def test_a_logger_without_its_package_says_what_to_install(
    logger: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    code, message = fit(capsys, f"--trainer.logger={logger}", "--trainer.logger.save_dir=logs")
    assert code == 2 and "pip install" in message and len(message) < 200


def test_an_option_without_effect_says_so(folder: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    assert fit(capsys, "--trainer.default_root_dir=elsewhere", "--trainer.fast_dev_run=1")[0] == 0
    assert "trainer.default_root_dir has no effect: a run writes to --run_dir" in caplog.text


SMALL_TEXT = {"width": 32, "heads": 2, "layers": 1}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "objectives.MAE": {"encoder": "test_vim"}, "objectives.SimMIM": {"encoder": "test_vim"},
    "objectives.ARM": {"encoder": "test_arm"}, "objectives.CLIP": {"encoder": "test_vim", "text": SMALL_TEXT},
    "objectives.MAECLIP": {"encoder": "test_vim", "text": SMALL_TEXT},
    "objectives.Finetune": {"encoder": "test_vim", "num_classes": 2},
    "objectives.LinearProbe": {"encoder": "test_vim", "num_classes": 2},
    "datamodules.ImageShards": {"train": "train.tar"}, "datamodules.ImageTextShards": {"train": "train.tar"},
    "datamodules.ImageFolder": {"train": "."}, "datamodules.Digits": {}, "datamodules.Shapes": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_every_argument_of_ours_takes_or_refuses_every_value(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainerCLI, "fit", lambda self, model, **given: None)
    cls = getattr(objectives if kind.startswith("objectives") else datamodules, kind.partition(".")[2])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    part = "model" if kind.startswith("objectives") else "data"
    recipe[part] = {"class_path": f"ssmpretrain.{kind}", "init_args": ARGUMENTS[kind]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, kinds in typing.get_type_hints(cls.__init__).items():
        fields = dataclasses.fields(kinds) if dataclasses.is_dataclass(kinds) else ()
        for option in [f"{name}.{field.name}" for field in fields] or [name]:
            for value in ("-1", "1" + 20 * "0", ".inf", "", "lots"):
                code, message = fit(capsys, f"--{part}.{option}={value}")
                assert code in (0, 2), f"{option}={value}: {message}"
                assert (code == 0) == (message == "") and len(message) < 700, message
