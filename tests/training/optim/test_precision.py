"""Parameters stay in float32, whichever way a precision is spelled."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from ssmpretrain.cli import main
from ssmpretrain.objectives import MAE
from ssmpretrain.training.optim.precision import check_precision

TRUE = [{"precision": "bf16-true"}, {"precision": "16-true"}, {"plugins": HalfPrecision("bf16-true")}]
MIXED = [
    {"precision": precision} for precision in ("bf16-mixed", "bf16", "16-mixed", "16", 16, "32-true", 32, "32", 64)
]


def trainer(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


@pytest.mark.parametrize("options", TRUE)
def test_parameters_in_less_than_float32_are_refused_with_the_remedy(options: dict[str, Any]) -> None:
    one = trainer(**options)
    with pytest.raises(ValueError, match=r"got (bf)?16-true, which keeps .* Set trainer.precision to bf16-mixed\."):
        check_precision(one)
    model = MAE("test_vim", decoder_embed_dim=16)
    model._trainer = one
    with pytest.raises(ValueError, match="parameters are kept in float32"):
        model.configure_model()


@pytest.mark.parametrize("options", [*MIXED, {"plugins": MixedPrecision("bf16-mixed", "cpu")}])
def test_what_computes_in_less_is_not(options: dict[str, Any]) -> None:
    check_precision(trainer(**options))


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.precision=16-true"],
        ["--trainer.plugins=lightning.pytorch.plugins.HalfPrecision", "--trainer.plugins.precision=bf16-true"],
    ],
)
def test_a_command_is_refused_before_any_folder_is_made(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "--config", "quickstart", *words]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssmpretrain: ")]
    assert "Set trainer.precision to bf16-mixed." in message and not list(tmp_path.iterdir())
