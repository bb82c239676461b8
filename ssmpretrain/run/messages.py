"""Messages and exit codes for errors: our own, and those of the system, of jsonargparse, Lightning and torch."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown_lines
from ssmpretrain.base.wording import REMEDIES, remedy
from ssmpretrain.run.option_messages import parse_error
from ssmpretrain.training.stopping.signals import INTERRUPTED, STOPPED

OUR_FAULT, USER_INPUT = 1, 2
_FAULT = (
    "no option or recipe explains this error. If the lines above end in code of your own, correct it there; otherwise "
    "it is a fault of ours: please report it with these lines."
)
_LONG = 300  # characters that are kept of a name in an error of the system
# torch, NumPy and Lightning have no classes for these errors, so their texts are matched. Our errors are classes.
_KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed by signal: (.+?)\.|exited unexpectedly)"
)
_OTHER_STATE = re.compile(r"Error\(s\) in loading state_dict for (\w+):\s*(.+)")
_NO_MEMORY = re.compile(
    r"(?:can't allocate memory: you tried to allocate|std::bad_alloc|Unable to allocate) ?([\d.]+ \w+)?"
)
_NO_PACKAGE = re.compile(r"pip install (?:-U )?['\"]?([\w.-]+)")


def exit_code(error: BaseException, config_files: Iterable[Path] = ()) -> int:
    """Print the reason why a command ended early, and return its exit code.

    Args:
        error: The exception that ended the command.
        config_files: Recipes of this run, searched for the line of an unknown option.

    Raises:
        SystemExit: `error` itself, if it is a SystemExit without a signal or keyboard interrupt as its cause.
    """
    if isinstance(error, SystemExit):
        if error.code in (STOPPED, INTERRUPTED):  # it has printed its line
            return int(error.code)
        if not isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns one into a SystemExit
            raise error
    if isinstance(error, KeyboardInterrupt | SystemExit):
        print("ssmpretrain: interrupted", file=sys.stderr)
        return INTERRUPTED
    explained = explain(error, config_files)
    if explained is None:
        traceback.print_exception(error)
        print(f"ssmpretrain: {_FAULT}", file=sys.stderr)
        return OUR_FAULT
    code, message = explained
    if message:  # empty where another rank says it
        print(f"ssmpretrain: {shown_lines(message)}", file=sys.stderr)
    return code


def explain(error: BaseException, config_files: Iterable[Path] = ()) -> tuple[int, str] | None:
    """Return the exit code and the message of an error that the user can mend, or None for a fault of the code.

    A `UserError` of this package carries both. Errors of the operating system, of the recipe's parser, of Lightning and
    of torch are recognised here and get a message here. Every other exception counts as a fault of the code.

    Args:
        error: The exception that ended the command.
        config_files: Recipes of this run, searched for the line of an unknown option.
    """
    explained = _explain_one(error, config_files)
    if explained is None and error.__cause__ is not None:  # jsonargparse wraps what a constructor raised
        explained = explain(error.__cause__, config_files)
    return _explain_text(str(error)) if explained is None else explained


def _explain_one(error: BaseException, config_files: Iterable[Path]) -> tuple[int, str] | None:
    if isinstance(error, UserError):
        return error.exit_code, "" if error.is_told else str(error)
    if isinstance(error, argparse.ArgumentError):
        return USER_INPUT, parse_error(str(error), config_files)
    if isinstance(error, OSError) and (message := _system_error(error)):
        return USER_INPUT, message
    if message := _torch_error(error):
        return USER_INPUT, message
    if _is_a(error, "lightning.fabric.utilities.spike", "TrainingSpikeException"):
        return OUR_FAULT, str(error)
    if _raised_by_lightning(error):
        return USER_INPUT, _trainer_error(str(error))
    return None


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Return whether an error has a class of another package. A package that is not imported cannot have raised it."""
    return isinstance(error, getattr(sys.modules.get(module), name, ()))


def _system_error(error: OSError) -> str | None:
    """Return the message for an error of the operating system that names a file or that has a remedy."""
    if error.filename is None:
        return f"{error.strerror}. {remedy(error)}" if error.errno in REMEDIES else None
    name = str(error.filename)
    name = name if len(name) <= _LONG else f"{name[:_LONG]}... ({len(name):,} characters)"
    return f"{name}: {error.strerror or error}. {remedy(error)}"


def _torch_error(error: BaseException) -> str | None:
    if _is_a(error, "torch", "OutOfMemoryError"):
        return "out of GPU memory. Lower --data.batch_size, or raise --trainer.accumulate_grad_batches."
    if killed := _KILLED_WORKER.search(str(error)):
        return _killed_worker(killed[1] or "")
    if match := _OTHER_STATE.search(str(error)):
        return (
            f"the checkpoint does not fit the {match[1]} of this configuration: {match[2].strip().rstrip('.')}. "
            "Give the options of the model that it was trained with."
        )
    return None


def _raised_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning raised an error about its options: its own class, or another class from its code."""
    if _is_a(error, "lightning.fabric.utilities.exceptions", "MisconfigurationException"):
        return True
    if isinstance(error, ImportError) or "lightning.pytorch" not in sys.modules:
        return False
    from ssmpretrain.base.lightning_private import raised_by_lightning  # most commands do without Lightning

    return raised_by_lightning(error)


def _trainer_error(text: str) -> str:
    if "gpu" in text.lower() and ("No supported" in text or "not found" in text or "accelerator" in text):
        return (
            "trainer: this recipe asks for GPUs and this machine has none that PyTorch can use. "
            "To try it on the CPU add --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1."
        )
    if "`training_step()`" in text:
        return "model: the class of an objective has a method training_step; got none. Write it, and return the loss."
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(text.split()))
    told = sentences[0]
    for sentence in sentences[1:]:
        if len(told) + len(sentence) < _LONG:
            told += f" {sentence}"
    return f"trainer: {told.rstrip('.')}. Correct the options of the trainer in the recipe or on the command line."


def _explain_text(text: str) -> tuple[int, str] | None:
    """Explain an error by its text: a missing package, too little memory, or null for a group of options."""
    if packages := _NO_PACKAGE.findall(text):
        who = re.search(r"class_path '[\w.]*\.(\w+)'|`([A-Z]\w+)`", text)
        name = (who[1] or who[2]) if who else "recipe"
        package = min(packages, key=len)
        return USER_INPUT, f"{name}: needs the package {package}; it is not installed. pip install {package}"
    if memory := _NO_MEMORY.search(text):
        return USER_INPUT, (
            f"out of memory{f': {memory[1]} are not available' if memory[1] else ''}. Lower the sizes of the model, "
            "data.image_size or data.batch_size."
        )
    if "argument after ** must be a mapping, not NoneType" in text:
        return USER_INPUT, (
            "recipe: a group of settings, such as model.optimizer or model.schedule, holds options by name; got null. "
            "Leave the group out for its defaults."
        )
    return None


def _killed_worker(signal: str) -> str:
    """Return the message for a loader worker that the system ended.

    Args:
        signal: The description of the signal in C, such as "Killed"; empty if torch does not know it.
    """
    happened = f"a worker process was ended from outside{f' ({signal})' if signal else ''}"
    if signal.startswith("Bus error"):
        return (
            f"data: {happened}, because /dev/shm is full. Give the container more (docker: --shm-size), or lower "
            "data.num_workers."
        )
    return (
        f"data: {happened}, most likely because the machine had no memory left. Lower data.num_workers or "
        "data.batch_size, or ask for more memory; then start the same command again to continue."
    )
