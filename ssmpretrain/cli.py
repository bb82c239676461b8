"""The command line: the table of commands, and the start of each.

Exit codes: 0 done, 1 a fault or a failed run, 2 wrong input, 75 stopped by a signal or max_time with everything saved
(start the same command again), 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from ssmpretrain import __version__
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown_lines
from ssmpretrain.base.wording import nearest
from ssmpretrain.base.yaml_files import check_recipe
from ssmpretrain.commands.recipes import FOLDER, named_recipes, with_packaged_recipes
from ssmpretrain.commands.shared.added import added_command, added_commands
from ssmpretrain.commands.shared.arguments import CommandParser
from ssmpretrain.run.messages import USER_INPUT, exit_code
from ssmpretrain.run.option_messages import given_again
from ssmpretrain.training.stopping.signals import stopped_at_once

if TYPE_CHECKING:
    from ssmpretrain.run.trainer_cli import TrainerCLI

# A command is a module of ssmpretrain.commands with add_arguments(parser) and run(args) -> exit code; here is its line.
_COMMANDS = {
    "shards": "pack image folders into webdataset shards, and verify them",
    "plan": "show what a run would read on how many ranks, and check it",
    "export": "write an encoder as safetensors, for timm, the official code, torch.export or ONNX, and CLIP for "
    "open_clip",
    "embed": "write the features of images, with keys and labels",
    "knn": "judge an encoder's features by their nearest neighbours",
    "zeroshot": "classify images by names and retrieve them by captions",
    "recipes": "list the recipes that come with the package",
    "reconstruct": "draw what a pretrained model predicts of your images",
    "erf": "draw an encoder's effective receptive field, before and after training",
}
_TRAINER_COMMANDS = {
    "fit": "train what a recipe describes:  fit --config recipes/mae_vim_b.yaml",
    "validate": "evaluate a run of your own:  validate --config RUN/config.yaml",
    "demo": "pretrain on small real images in a few minutes, without a GPU or a download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` defaults to the words after the program's name."""
    _set_up_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with stopped_at_once():
            argv = with_packaged_recipes(argv)
            return _run(argv)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return exit_code(error, named_recipes(argv))


def _set_up_process() -> None:
    # Before torch loads OpenMP: its threads wait actively for milliseconds, which on shared cores takes the time from
    # whoever they wait for. Two runs at once on two cores, per training step of the demo: 4.5 s without, 0.34 s with.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of stack frames where one line says who is gone
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that cannot be encoded does not cost the rest of the output
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else USER_INPUT
    if argv[0] in ("-V", "--version", "version"):
        print(f"ssmpretrain {__version__}")
        return 0
    command = argv[0]
    if command not in _TRAINER_COMMANDS:
        return _run_command(command, argv[1:])
    _name_repeated(argv, ["--config"])
    if command == "demo":
        return _run_demo(argv[1:])
    for recipe in named_recipes(argv):
        check_recipe(recipe)
    _start_trainer(argv)
    return 0


def _run_command(name: str, words: list[str]) -> int:
    """Run a command of ours, or one that another package adds."""
    if name in _COMMANDS:
        module, what = import_module(f"ssmpretrain.commands.{name}"), _COMMANDS[name]
    elif found := added_command(name):
        module, what = found
    else:
        known = [*_TRAINER_COMMANDS, *_COMMANDS, *added_commands()]
        raise UserError(f"{name}: no such command. {nearest(name, known, 'Commands')}")
    parser = CommandParser(prog=f"ssmpretrain {name}", description=f"{what[0].upper()}{what[1:]}.")
    module.add_arguments(parser)
    _name_repeated(words, parser.repeatable())
    return int(module.run(parser.read(words)))


def _name_repeated(words: list[str], repeatable: Collection[str]) -> None:
    """Print a line for each option that is given two values; of several ranks on a machine the first does."""
    for line in given_again(words, repeatable) if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        print(shown_lines(line), file=sys.stderr)


def _start_trainer(argv: list[str]) -> TrainerCLI:
    from ssmpretrain.run.trainer_cli import TrainerCLI  # imports Lightning: seconds that no other command waits

    return TrainerCLI(argv)


def _run_demo(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print("usage: ssmpretrain demo [options of fit]\n\nRuns the recipe quickstart.yaml in a fresh run folder.")
        return 0
    trained = _start_trainer(["fit", "--config", str(FOLDER / "quickstart.yaml"), "--fresh", *words])
    from ssmpretrain.commands.demo import report

    print(report(trained.model, trained.datamodule, trained.folder))
    return 0


def _help() -> str:
    rows = (_TRAINER_COMMANDS | _COMMANDS | added_commands()).items()
    listed = "\n".join(f"  {name:<12}{what}" for name, what in rows)
    return (
        f"ssmpretrain {__version__}: self-supervised pretraining for vision state-space models\n\n"
        f"usage: ssmpretrain COMMAND [options]      ssmpretrain COMMAND --help\n\n{listed}"
    )
