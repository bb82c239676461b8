"""Say in one short message what went wrong, where, and what to do; and with which exit code to leave."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib
import inspect
import re
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path

OUR_FAULT, USER_INPUT = 1, 2
_MAX_LISTED = 16
_PACKAGE = Path(__file__).resolve().parent
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'")
_KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed by signal: (.+?)\.|exited unexpectedly)"
)
_REMEDIES = {
    errno.EACCES: "Choose a folder that you may write to, or change its permissions.",
    errno.EPERM: "Choose a folder that you may write to, or change its permissions.",
    errno.EROFS: "The file system is mounted read-only; choose another folder.",
    errno.ENOSPC: "The disk is full; free some space or choose another folder.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A file stands where a folder is needed; choose another path.",
    errno.EEXIST: "A file stands where a folder is needed; choose another path.",
    errno.EIO: "The disk, or the server that it is on, reports a fault; look at it, or choose another folder.",
    errno.ESTALE: "The file server has lost it; mount it again, or choose another folder.",
    errno.EISDIR: "A folder was given where a file is needed.",
}


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
        return explain(error.__cause__, config_files)
    return explained


def _explain_one(error: BaseException, config_files: Iterable[Path]) -> tuple[int, str] | None:
    if isinstance(error, argparse.ArgumentError):
        return USER_INPUT, _parse_error(str(error), config_files)
    if isinstance(error, OSError) and error.filename is not None:
        return USER_INPUT, f"{error.filename}: {error.strerror or error}. {remedy(error)}"
    kinds = {base.__name__ for base in type(error).__mro__}
    if kinds & {"TrainingDiverged", "RankLost"}:
        return OUR_FAULT, str(error)
    if "RanksDisagree" in kinds:
        return USER_INPUT, ""  # rank 0 has said it
    if "OutOfMemoryError" in kinds:
        return USER_INPUT, "out of GPU memory. Lower --data.batch_size, or raise --trainer.accumulate_grad_batches."
    if killed := _KILLED_WORKER.search(str(error)):
        return USER_INPUT, _killed_worker(killed[1] or "")
    if "MisconfigurationException" in kinds:
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


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system."""
    return _REMEDIES.get(error.errno or 0, "Check the path.")


def nearest(word: str, known: Iterable[str], label: str) -> str:
    """`Did you mean 'x'?` for the closest of `known`, else the list of them introduced by `label`."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    more = ", ..." if len(known) > _MAX_LISTED else ""
    return f"Did you mean {close[0]!r}?" if close else f"{label}: {', '.join(known[:_MAX_LISTED])}{more}."


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback belongs to this package (its links resolve beside it)."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = [_PACKAGE, *((_PACKAGE / link).resolve() for link in ("kernels", "datamodules"))]
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(room) for room in rooms)


def _trainer_error(text: str) -> str:
    if "gpu" in text.lower() and ("No supported" in text or "not found" in text or "accelerator" in text):
        return (
            "trainer: this recipe asks for GPUs and this machine has none that PyTorch can use. "
            "To try it on the CPU add --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1."
        )
    return "trainer: " + " ".join(text.split())


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


def _parse_error(text: str, config_files: Iterable[Path]) -> str:
    """Boil an error of jsonargparse, which prints every type it tried, down to its cause."""
    if match := _UNKNOWN_OPTION.search(text):
        return _unknown_option(next(group for group in match.groups() if group), text, config_files)
    if match := re.search(r"the following arguments are required: (.+)", text):
        missing = re.sub(r"\b(fit|validate)\.", "", match[1])
        return f"{missing} not set. Give a recipe, e.g. --config recipes/quickstart.yaml"
    if text.startswith("Problems parsing config"):
        where = " ".join(str(path) for path in config_files)
        return f"{where}: not valid YAML: {' '.join(text.split(':', 1)[1].split())}"
    if match := re.search(r"unrecognized arguments: (.+)", text):
        option = match[1].split()[0].split("=")[0].lstrip("-")
        return f"{option}: no such option. {nearest(option, _known_options(text, option), 'Known options')}"
    if match := re.search(r"Parser key \"config\": File does not exist: '?([^']+)'?", text):
        return f"{match[1]}: no such recipe. `python -m ssmpretrain recipes` lists those that come with the package."
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        names = getattr(importlib.import_module(match[1]), "__all__", [])
        return f"class_path {match[1]}.{match[2]}: no such class. {nearest(match[2], names, 'That module has')}"
    if match := re.search(r"(?:import path|Unexpected import path format|No module named) ?:? ?'?([\w.]+)'?", text):
        return f"class_path {match[1]}: cannot be imported. Give a class in full, e.g. ssmpretrain.objectives.MAE."
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    keys = [m[1] for line in lines if (m := re.match(r'Parser key "([^"]+)":', line))]
    causes = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines if "Expected" in line] or lines[-1:]
    cause = " or ".join(dict.fromkeys(cause for cause in causes if "NoneType" not in cause)).replace(
        " or Expected", " or"
    )
    for noise, plain in (("<class '", ""), ("'>", ""), ("typing.Literal", "one of "), ("a one of", "one of")):
        cause = cause.replace(noise, plain)
    given = re.search(r"^ *Given value: (?!Namespace|NestedArg|\{'class_path)(.+)$", text, flags=re.MULTILINE)
    got = f"; got {given[1]}" if given and "Got value" not in cause else ""
    return f"{'.'.join(keys) or 'recipe'}: {cause.rstrip('.')}{got}. Correct it in the recipe or on the command line."


def _unknown_option(option: str, text: str, config_files: Iterable[Path]) -> str:
    where = _line_of(option.rsplit(".", 1)[-1], config_files)
    known = _known_options(text, option)
    word = option if option.split(".")[0] in {name.split(".")[0] for name in known} else option.rsplit(".", 1)[-1]
    return f"{where}{option}: no such option. {nearest(word, known, 'Known options')}"


def _line_of(key: str, config_files: Iterable[Path]) -> str:
    """`file:line: ` of the first place where a recipe sets `key`, or nothing."""
    for path in config_files:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
            if re.search(rf"(^|[\s{{,]){re.escape(key)}\s*:", line.split("#")[0]):
                return f"{path}:{number}: "
    return ""


def _known_options(text: str, option: str) -> list[str]:
    """Options that are valid at the place of which an error message about `option` speaks."""
    group = re.search(r"Group '([^']+)' does not accept", text) or re.match(r"(.+)\.\w+$", option)
    if match := re.search(r"given class_path '([\w.]+)'", text):
        module, _, name = match[1].rpartition(".")
        return _options_of(getattr(importlib.import_module(module), name), group[1] if group else None)
    from lightning.pytorch import Trainer

    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    return ["config", "model", "data", "run_dir", "fresh", "allow_changes", "ckpt_path", "seed_everything", *trainer]


def _options_of(cls: type, group: str | None) -> list[str]:
    """Arguments of a class, or those of its dataclass argument `group`."""
    if group:
        nested = typing.get_type_hints(cls.__init__).get(group.split(".")[-1])  # type: ignore[misc]
        if nested is not None and dataclasses.is_dataclass(nested):
            return [field.name for field in dataclasses.fields(nested)]
    taken: list[str] = []
    for base in cls.__mro__:  # **kwargs stands for the arguments of the class above
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        taken += [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return [name for name in dict.fromkeys(taken) if name != "self"]
