"""The command `recipes`, which lists those that come with the package, and recipes as words of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import nearest

FOLDER = Path(__file__).parents[1] / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", nargs="?", help="print this recipe, e.g. mae_vim_b; without it, list all")


def run(args: argparse.Namespace) -> int:
    """List the recipes with the first line of their headers, or print one."""
    if args.name:
        path = FOLDER / f"{args.name.removesuffix('.yaml')}.yaml"
        if not path.exists():
            names = [recipe.stem for recipe in sorted(FOLDER.glob("*.yaml"))]
            raise UserError(f"recipes: {args.name}: no such recipe. {nearest(args.name, names, 'The package has')}")
        print(path.read_text(), end="")
        return 0
    recipes = sorted(FOLDER.glob("*.yaml"))
    width = max(len(recipe.stem) for recipe in recipes) + 2
    for recipe in recipes:
        print(f"{recipe.stem:<{width}}{recipe.read_text().splitlines()[0].removeprefix('# ')}")
    return 0


def with_packaged_recipes(words: Sequence[str]) -> list[str]:
    """Return a command line in which `--config NAME` gives the path of a packaged recipe, unless a file has that name.

    Args:
        words: The command line. `NAME` stands alone or in a folder `recipes`, with or without `.yaml`.
    """
    resolved = list(words)
    for place, flag, path in _config_words(words):
        packaged = FOLDER / f"{Path(path).name.removesuffix('.yaml')}.yaml"
        if not Path(path).exists() and str(Path(path).parent) in (".", "recipes") and packaged.exists():
            resolved[place] = f"{flag}{packaged}"
    return resolved


def named_recipes(words: Sequence[str]) -> list[Path]:
    """Return the paths that `--config` names, in the order of the command line."""
    return [Path(path) for _, _, path in _config_words(words)]


def _config_words(words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield the place of each word that names a recipe, what stands before the path in it, and the path."""
    for place, word in enumerate(words):
        if word.startswith("--config="):
            yield place, "--config=", word.removeprefix("--config=")
        elif place and words[place - 1] in ("--config", "-c"):
            yield place, "", word
