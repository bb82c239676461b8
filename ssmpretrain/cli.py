"""The command line: the table of commands, and the function that runs one.

Exit codes: 0 for success, 1 for a fault or a failed run, 2 for wrong input, 75 for a run that a signal or max_time
stopped and that is saved (start the same command again), 130 for an interrupt.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain import __version__
from ssmpretrain.base.yaml_files import check_recipe
from ssmpretrain.commands.recipes import QUICKSTART, with_packaged_recipes
from ssmpretrain.commands.shared.repeated_options import name_repeated
from ssmpretrain.commands.shared.running import added_commands, run_command
from ssmpretrain.run.messages import USER_INPUT, exit_code
from ssmpretrain.training.stopping.signals import STOPPED, stopped_at_once

# Each command is a module of ssmpretrain.commands with add_arguments(parser) and run(args) -> exit code.
_COMMANDS = {
    "shards": "pack image folders into webdataset shards, and verify them",
    "plan": "show what a run would read on how many ranks, and check it",
    "export": "write an encoder as safetensors, for timm, the official code, torch.export or ONNX, and CLIP for "
    "open_clip",
    "embed": "write the features of images, with keys and labels",
    "knn": "judge an encoder's features by their nearest neighbours",
    "neighbours": "draw images beside their nearest neighbours among an encoder's features",
    "pca": "draw an encoder's patch features as colours, beside the images",
    "zeroshot": "classify images by names and retrieve them by captions",
    "compare": "print the metrics of runs beside the settings in which the runs differ",
    "segment": "draw the classes of the pixels of your images, and write them as class maps",
    "detect": "draw the objects in your images, and write them as COCO's json",
    "recipes": "list the recipes that come with the package",
    "reconstruct": "draw what a pretrained model predicts of your images",
    "erf": "draw an encoder's effective receptive field, before and after training",
}
# These commands build a trainer from a recipe.
_TRAINER_COMMANDS = {
    "fit": "train what a recipe describes:  fit --config recipes/mae_vim_b.yaml",
    "validate": "evaluate a run of your own:  validate --config RUN/config.yaml",
    "demo": "pretrain on small real images in a few minutes, without a GPU or a download",
}
_DEMO_HELP = "usage: ssmpretrain demo [options of fit]\n\nRuns the recipe quickstart.yaml in a fresh run folder."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` defaults to the words after the program's name."""
    _set_up_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "help"
    recipes: list[Path] = []
    try:
        with stopped_at_once():
            if command in ("-V", "--version", "version"):
                print(f"ssmpretrain {__version__}")
                return 0
            if command in ("-h", "--help", "help"):
                print(_help())
                return 0 if argv else USER_INPUT
            if command == "demo":
                if {"-h", "--help"} & set(argv):
                    print(_DEMO_HELP)
                    return 0
                argv = ["fit", "--config", str(QUICKSTART), "--fresh", *argv[1:]]
                # One core trains, the other makes the views: 1176 images per second on two cores, with two threads 685.
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            argv, recipes = with_packaged_recipes(argv)
            if command not in _TRAINER_COMMANDS:
                return run_command(argv, _COMMANDS, list(_TRAINER_COMMANDS))
            name_repeated(argv, ["--config"])
            for recipe in recipes:
                check_recipe(recipe)
            from ssmpretrain.run.trainer_cli import TrainerCLI  # here: Lightning takes seconds to import

            trained = TrainerCLI(argv)
            if command == "demo":
                from ssmpretrain.commands.demo import report

                print(report(trained.model, trained.datamodule, trained.folder))
            return 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return exit_code(error, recipes)


def run_process() -> int:
    """Run one command as the whole work of this process, and return its exit code."""
    code = main()
    if code in (0, STOPPED) and "torch.distributed" in sys.modules:
        from ssmpretrain.base.ranks import leave  # here: torch takes seconds to import

        leave()
    return code


def _set_up_process() -> None:
    # Set this before torch loads OpenMP. By default its threads wait actively for milliseconds; on shared cores this
    # takes time from the very threads that they wait for. Two runs of the demo at once on two cores take 4.5 s a step
    # without this line and 0.34 s with it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line of ours names a lost rank; hide a page of frames
    if isinstance(sys.stdout, io.TextIOWrapper):  # print escapes instead of failing at a name that cannot be encoded
        sys.stdout.reconfigure(errors="backslashreplace")


def _help() -> str:
    ours = _TRAINER_COMMANDS | _COMMANDS
    rows = (ours | added_commands(ours)).items()
    listed = "\n".join(f"  {name:<12}{what}" for name, what in rows)
    return (
        f"ssmpretrain {__version__}: self-supervised pretraining for vision state-space models\n\n"
        f"usage: ssmpretrain COMMAND [options]      ssmpretrain COMMAND --help\n\n{listed}"
    )
