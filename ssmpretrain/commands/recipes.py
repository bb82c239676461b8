"""`recipes`: list the recipes of the package; and resolve names of such recipes on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import nearest

FOLDER = Path(__file__).parents[1] / "recipes"
QUICKSTART = FOLDER / "quickstart.yaml"  # recipe of the demo


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


def with_packaged_recipes(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Resolve the recipes of a command line: `--config NAME` names a packaged recipe, unless a file has that name.

    Args:
        words: The command line. `NAME` stands alone or in a folder `recipes`, with or without `.yaml`.

    Returns:
        The command line with the paths of packaged recipes, and the paths of all recipes in it.
    """
    resolved, recipes = list(words), []
    for place, word in enumerate(words):
        flag = "--config=" if word.startswith("--config=") else ""
        if not flag and (place == 0 or words[place - 1] not in ("--config", "-c")):
            continue
        path = Path(word.removeprefix(flag))
        packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
        if not path.exists() and str(path.parent) in (".", "recipes") and packaged.exists():
            path = packaged
            resolved[place] = f"{flag}{path}"
        recipes.append(path)
    return resolved, recipes
