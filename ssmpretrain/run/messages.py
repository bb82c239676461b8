"""Say in one short message what went wrong, where, and what to do; and with which exit code to leave."""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from ssmpretrain.base.wording import remedy
from ssmpretrain.run.option_messages import parse_error

OUR_FAULT, USER_INPUT = 1, 2
_LONG = 300  # characters of Lightning's that are passed on
_PACKAGE = Path(__file__).resolve().parents[1]
_KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed by signal: (.+?)\.|exited unexpectedly)"
)
_NO_MEMORY = re.compile(
    r"(?:can't allocate memory: you tried to allocate|std::bad_alloc|Unable to allocate) ?([\d.]+ \w+)?"
)
_NO_PACKAGE = re.compile(r"pip install (?:-U )?['\"]?([\w.-]+)")


def explain(error: BaseException, config_files: Iterable[Path] = ()) -> tuple[int, str] | None:
    """Exit code and message for an error that a person can mend; None for a fault of ours.

    A `ValueError` or `TypeError` raised by this package's own code is written for people; the same class raised deeper
    down is a fault. Errors of the operating system and of the recipe's parser are put into words here.

    Args:
        error: What was raised.
        config_files: Recipes of this run, searched for the line of an unknown option.
    """
    explained = _explain_one(error, config_files)
    if explained is None and error.__cause__ is not None:  # jsonargparse wraps what a constructor raised
        explained = explain(error.__cause__, config_files)
    if explained is None:
        explained = _explain_text(str(error))
    return explained


def _explain_one(error: BaseException, config_files: Iterable[Path]) -> tuple[int, str] | None:
    if isinstance(error, argparse.ArgumentError):
        return USER_INPUT, parse_error(str(error), config_files)
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        name = name if len(name) <= _LONG else f"{name[:_LONG]}... ({len(name):,} characters)"
        return USER_INPUT, f"{name}: {error.strerror or error}. {remedy(error)}"
    kinds = {base.__name__ for base in type(error).__mro__}
    if kinds & {"TrainingDiverged", "RankLost", "TrainingSpikeException"}:
        return OUR_FAULT, str(error)
    if "RanksDisagree" in kinds:
        return USER_INPUT, ""  # rank 0 has said it
    if "OutOfMemoryError" in kinds:
        return USER_INPUT, "out of GPU memory. Lower --data.batch_size, or raise --trainer.accumulate_grad_batches."
    if killed := _KILLED_WORKER.search(str(error)):
        return USER_INPUT, _killed_worker(killed[1] or "")
    if "MisconfigurationException" in kinds or (not isinstance(error, ImportError) and _raised_by_lightning(error)):
        return USER_INPUT, _trainer_error(str(error))
    if "DataError" in kinds:  # raised anew by torch where a worker raised it, so the traceback does not tell
        return USER_INPUT, str(error)
    if match := re.search(r"Error\(s\) in loading state_dict for (\w+):\s*(.+)", str(error)):
        return USER_INPUT, (
            f"the checkpoint does not fit the {match[1]} of this configuration: {match[2].strip().rstrip('.')}. "
            "Give the options of the model that it was trained with."
        )
    if isinstance(error, (ValueError, TypeError, OSError)) and _raised_here(error):
        return USER_INPUT, str(error)
    return None


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback belongs to this package (its links resolve beside it)."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = [_PACKAGE, *((_PACKAGE / link).resolve() for link in ("kernels", "datamodules"))]
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(room) for room in rooms)


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning found it wrong, and says so: options of the Trainer are nobody else's to judge."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = bool(frames) and re.search(r"/lightning/(pytorch|fabric)/", frames[-1].filename) is not None
    return theirs and (frames[-1].line or "").startswith("raise ")


def _trainer_error(text: str) -> str:
    if "gpu" in text.lower() and ("No supported" in text or "not found" in text or "accelerator" in text):
        return (
            "trainer: this recipe asks for GPUs and this machine has none that PyTorch can use. "
            "To try it on the CPU add --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1."
        )
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(text.split()))
    told = sentences[0]
    for sentence in sentences[1:]:
        if len(told) + len(sentence) < _LONG:
            told += f" {sentence}"
    return f"trainer: {told.rstrip('.')}. Correct the options of the trainer in the recipe or on the command line."


def _explain_text(text: str) -> tuple[int, str] | None:
    """What only the text tells: errors of jsonargparse, and of whoever misses a package or memory."""
    if packages := _NO_PACKAGE.findall(text):
        who = re.search(r"class_path '[\w.]*\.(\w+)'|`([A-Z]\w+)`", text)
        name = (who[1] or who[2]) if who else "recipe"
        package = min(packages, key=len)
        return USER_INPUT, f"{name}: needs the package {package}; it is not installed. pip install {package}"
    if memory := _NO_MEMORY.search(text):
        return USER_INPUT, (
            f"out of memory{f': {memory[1]} are not there' if memory[1] else ''}. Lower the sizes of the model, "
            "data.image_size or data.batch_size."
        )
    if "argument after ** must be a mapping, not NoneType" in text:
        return USER_INPUT, (
            "recipe: a group of settings, such as model.optimizer or model.schedule, holds options by name; got null. "
            "Leave the group out for its defaults."
        )
    return None


def _killed_worker(signal: str) -> str:
    """`signal` is its name as C has it, such as "Killed"; empty where torch does not know it."""
    happened = f"a worker process was ended from outside{f' ({signal})' if signal else ''}"
    if signal.startswith("Bus error"):
        return (
            f"data: {happened}, as /dev/shm is full. Give the container more (docker: --shm-size), or lower "
            "data.num_workers."
        )
    return (
        f"data: {happened}, most likely because the machine had no memory left. Lower data.num_workers or "
        "data.batch_size, or ask for more memory; then start the same command again to continue."
    )
