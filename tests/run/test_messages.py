"""Errors on the command line: a message for mistakes of the user, a traceback for faults of the code."""

import errno
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ssmpretrain.base.errors import OutOfMemory, PathMissing, SourceError, UserError
from ssmpretrain.cli import main
from ssmpretrain.run.messages import explain
from ssmpretrain.training.checkpoints.saving import CheckpointNotSaved
from ssmpretrain.training.ranks.agreement import RanksDisagree
from ssmpretrain.training.ranks.roll_call import RankLost
from ssmpretrain.training.stopping.non_finite import TrainingDiverged

TOLD = {
    UserError("x: is 1; got 2."): (2, "x: is 1; got 2."),
    SourceError("a.tar: gone."): (2, "a.tar: gone."),
    PathMissing("a: no file."): (2, "a: no file."),
    OutOfMemory("scan: no memory."): (2, "scan: no memory."),
    CheckpointNotSaved("a.ckpt: not written."): (2, "a.ckpt: not written."),
    RanksDisagree("rank 1: seed is 2."): (2, ""),
    RankLost("rank 1 does not answer."): (1, "rank 1 does not answer."),
    TrainingDiverged("step 3: not finite."): (1, "step 3: not finite."),
    OSError(errno.ENOENT, "No such file", "/a"): (2, "/a: No such file. Check the path."),
    OSError(errno.EPIPE, "Broken pipe"): (2, "Broken pipe. The program that read the output has ended."),
    MisconfigurationException("No such thing."): (
        2, "trainer: No such thing. Correct the options of the trainer in the recipe or on the command line.",
    ),
    MisconfigurationException("No `training_step()` method defined. Lightning expects one."): (
        2, "model: the class of an objective has a method training_step; got none. Write it, and return the loss.",
    ),
    torch.OutOfMemoryError("CUDA out of memory."): (
        2, "out of GPU memory. Lower --data.batch_size, or raise --trainer.accumulate_grad_batches.",
    ),
}  # fmt: skip
FAULTS = [
    ValueError("x"),
    TypeError("x"),
    KeyError("x"),
    OSError("x"),
    OSError(errno.EBADF, "Bad file"),
    AssertionError(),
]


@pytest.mark.parametrize("error", TOLD, ids=lambda error: type(error).__name__)
def test_an_error_that_a_person_can_mend_has_its_exit_code_and_message(error: Exception) -> None:
    assert explain(error) == TOLD[error]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_every_other_error_is_a_fault(error: Exception) -> None:
    assert explain(error) is None


def test_the_cause_of_an_error_is_told_where_the_error_says_nothing() -> None:
    error = RuntimeError("Connection closed by peer")
    error.__cause__ = RankLost("rank 1 does not answer.")
    assert explain(error) == (1, "rank 1 does not answer.")


OBJECTIVE = """
from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives import MAE

class Mine(MAE):
    def __init__(self, fails: str = "step", **kwargs):
        super().__init__(**kwargs)
        self.fails = fails
        if fails == "init":
            raise ValueError("mine: a bug")

    def training_step(self, batch, batch_idx):
        raise UserError("Mine: wants 3; got 4.") if self.fails == "told" else ValueError("mine: a bug")
"""
RECIPE = """
model: {class_path: my_objective.Mine, init_args: {encoder: test_vim, decoder_embed_dim: 32}}
data: {class_path: ssmpretrain.datamodules.Shapes, init_args: {image_size: 32, batch_size: 4, num_workers: 0,
  train_images: 8, val_images: 8}}
trainer: {accelerator: cpu, devices: 1, max_steps: 1, num_sanity_val_steps: 0}
"""


@pytest.mark.parametrize("fails", ("step", "init", "told"))
def test_an_error_of_a_users_own_code_keeps_its_traceback_unless_it_is_a_user_error(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objective", raising=False)
    Path("my_objective.py").write_text(OBJECTIVE)
    Path("recipe.yaml").write_text(RECIPE)
    code = main(["fit", "--config", "recipe.yaml", "--model.fails", fails])
    told = capsys.readouterr().err
    if fails == "told":
        assert code == 2 and "ssmpretrain: Mine: wants 3; got 4." in told and "Traceback" not in told
    else:
        assert code == 1 and "Traceback" in told and "my_objective.py" in told and "ValueError: mine: a bug" in told
        assert "If the lines above end in code of your own" in told
