"""The command line: Trainer calls through LightningCLI, our own commands, error text and exit codes.

Exit codes: 0 done, 1 our fault or a diverged run, 2 the user's input is wrong, 75 stopped by a signal or max_time with
everything saved (start the same command again), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ssmpretrain import __version__
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown_lines
from ssmpretrain.base.wording import nearest
from ssmpretrain.base.yaml_files import check_recipe
from ssmpretrain.commands.recipes import FOLDER as RECIPES
from ssmpretrain.run import messages
from ssmpretrain.run.option_messages import given_again
from ssmpretrain.training.stopping.signals import INTERRUPTED, STOPPED, stopped_at_once

if TYPE_CHECKING:
    from ssmpretrain.run.trainer_cli import TrainerCLI

# name: (what it does, module with add_arguments(parser) and run(args) -> exit code)
_COMMANDS = {
    "shards": ("pack image folders into webdataset shards, and verify them", "ssmpretrain.commands.shards"),
    "plan": ("show what a run would read on how many ranks, and check it", "ssmpretrain.commands.plan"),
    "export": (
        "write an encoder as safetensors, for timm, the official code, torch.export or ONNX, and CLIP for open_clip",
        "ssmpretrain.commands.export",
    ),
    "embed": ("write the features of images, with keys and labels", "ssmpretrain.commands.embed"),
    "knn": ("judge an encoder's features by their nearest neighbours", "ssmpretrain.commands.knn"),
    "zeroshot": ("classify images by names and retrieve them by captions", "ssmpretrain.commands.zeroshot"),
    "recipes": ("list the recipes that come with the package", "ssmpretrain.commands.recipes"),
    "reconstruct": ("draw what a pretrained model predicts of your images", "ssmpretrain.commands.reconstruct"),
    "erf": ("draw an encoder's effective receptive field, before and after training", "ssmpretrain.commands.erf"),
}
_LONG = 300  # characters of argparse's that are passed on
_REPEATABLE = ("--caption", "--trust")
_TRAINER_COMMANDS = {
    "fit": "train what a recipe describes:  fit --config recipes/mae_vim_b.yaml",
    "validate": "evaluate a run of your own:  validate --config RUN/config.yaml",
    "demo": "pretrain on small real images in a few minutes, without a GPU or a download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` defaults to the words after the program's name."""
    # Before torch loads OpenMP: its threads wait actively for milliseconds, which on shared cores takes the time from
    # whoever they wait for. Two runs at once on two cores, per training step of the demo: 4.5 s without, 0.34 s with.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of stack frames where one line says who is gone
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that cannot be encoded does not cost what else is said
        sys.stdout.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    recipes: list[Path] = []
    try:
        with stopped_at_once():
            words = _packaged_recipes(words, recipes)
            return _dispatch(words, recipes)
    except KeyboardInterrupt:
        print("ssmpretrain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):  # Lightning leaves so
            print("ssmpretrain: interrupted", file=sys.stderr)
            return INTERRUPTED
        if left.code in (STOPPED, INTERRUPTED):  # after its line
            return int(left.code)
        raise
    except Exception as error:
        explained = messages.explain(error, recipes)
        if explained is None:
            traceback.print_exc()
            print("ssmpretrain: this is a fault of ours; please report it with the lines above.", file=sys.stderr)
            return messages.OUR_FAULT
        code, message = explained
        if message:  # empty where another rank says it
            print(f"ssmpretrain: {shown_lines(message)}", file=sys.stderr)
        return code


def _dispatch(words: list[str], recipes: list[Path]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else messages.USER_INPUT
    if words[0] in ("-V", "--version", "version"):
        print(f"ssmpretrain {__version__}")
        return 0
    command, rest = words[0], words[1:]
    repeatable = ("--config",) if command == "demo" or command in _TRAINER_COMMANDS else _REPEATABLE
    for line in given_again(rest, repeatable) if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        print(shown_lines(line), file=sys.stderr)
    if command == "demo":
        return _demo(rest)
    if command in _TRAINER_COMMANDS:
        for recipe in recipes:
            check_recipe(recipe)
        _trainer_cli([command, *rest])
        return 0
    if command in _COMMANDS:
        what, module_name = _COMMANDS[command]
        module = importlib.import_module(module_name)
        parser = _Parser(prog=f"ssmpretrain {command}", description=what[0].upper() + what[1:] + ".")
        module.add_arguments(parser)
        args = parser.parse_args([_with_dashes(word) for word in rest])
        _check_whole_numbers(command, args)
        return int(module.run(args))
    known = [*_TRAINER_COMMANDS, *_COMMANDS]
    raise UserError(f"{command}: no such command. {nearest(command, known, 'Commands')}")


def _check_whole_numbers(command: str, args: argparse.Namespace) -> None:
    """Refuse what the arithmetic of torch and NumPy cannot take, whatever the option."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UserError(
                    f"{command}: --{name.replace('_', '-')} is a number of at most 64 bits; got {str(number)[:40]}. "
                    "Give a smaller one."
                )


def _with_dashes(word: str) -> str:
    """`--image_size` as `--image-size`: the trainer's options are written so, and nobody should have to remember."""
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if word.startswith("--") else word


def _trainer_cli(words: list[str]) -> TrainerCLI:
    from ssmpretrain.run.trainer_cli import (
        TrainerCLI,  # Lightning takes seconds to import; the other commands do not wait
    )

    return TrainerCLI(words)


def _demo(rest: list[str]) -> int:
    if {"-h", "--help"} & set(rest):
        print("usage: ssmpretrain demo [options of fit]\n\nRuns the recipe quickstart.yaml in a fresh run folder.")
        return 0
    trained = _trainer_cli(["fit", "--config", str(RECIPES / "quickstart.yaml"), "--fresh", *rest])
    from ssmpretrain.commands.demo import report

    print(report(trained.model, trained.datamodule, trained.folder))
    return 0


def _packaged_recipes(words: list[str], found: list[Path]) -> list[str]:
    """Point `--config` words that name no file at the recipe of that name in the package; collect all in `found`."""
    resolved = []
    for before, word in zip([None, *words], words, strict=False):
        flag, path = ("--config=", word[9:]) if word.startswith("--config=") else ("", word)
        if flag or before in ("--config", "-c"):
            packaged = RECIPES / f"{Path(path).name.removesuffix('.yaml')}.yaml"
            if not Path(path).exists() and str(Path(path).parent) in (".", "recipes") and packaged.exists():
                word = f"{flag}{packaged}"
                path = str(packaged)
            found.append(Path(path))
        resolved.append(word)
    return resolved


def _help() -> str:
    rows = [*_TRAINER_COMMANDS.items(), *((name, what) for name, (what, _) in _COMMANDS.items())]
    listed = "\n".join(f"  {name:<12}{what}" for name, what in rows)
    return (
        f"ssmpretrain {__version__}: self-supervised pretraining for vision state-space models\n\n"
        f"usage: ssmpretrain COMMAND [options]      ssmpretrain COMMAND --help\n\n{listed}"
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= _LONG else f"{message[:_LONG]}..."
        raise UserError(f"{message}. See `{self.prog} --help`.")
