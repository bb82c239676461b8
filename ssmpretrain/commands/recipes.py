"""`recipes`: list or print the recipes of the package."""

from __future__ import annotations

import argparse
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
