"""`pca`: draw the patch features of images as colours, by their three principal components."""

from __future__ import annotations

import argparse

import torch

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.feature_pictures import images, sides
from ssmpretrain.commands.feature_pictures.component_sheet import ColouredMaps, draw_components
from ssmpretrain.commands.feature_pictures.images import Picture, PictureSource, open_images
from ssmpretrain.commands.feature_pictures.sides import Side, load_sides
from ssmpretrain.commands.shared import figures, frozen_encoder
from ssmpretrain.evaluation.principal_components import component_colours, foreground

_MOST_IMAGES = 64  # that a person can look at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser, pooled=False)
    images.add_arguments(parser)
    parser.add_argument(
        "--limit", type=int, default=16, help="take at most this many images, evenly spread (default: %(default)s)"
    )
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="leave out the patches on one side of the first component, the side with more of the image borders, and "
        "compute the colours from the others alone, as DINOv2 does",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="interpolate between the patches (default: a square for each patch)"
    )
    sides.add_argument(parser)
    figures.add_out(parser, "pca.png")


def run(args: argparse.Namespace) -> int:
    """Draw images beside their coloured maps, and print the share of the variance that the colours show."""
    if not 1 <= args.limit <= _MOST_IMAGES:
        raise UserError(f"pca: --limit is from 1 to {_MOST_IMAGES}; got {args.limit}. Leave it out for 16.")
    out = figures.check_out(args.out, force=args.force, where="pca")
    found, pictures, notes = list[ColouredMaps](), list[Picture](), list[str]()
    for side in load_sides(args, where="pca"):
        source = open_images(args.images, args, side.encoder)
        pictures, maps = _coloured(side, source, args)
        found.append(maps)
        notes = source.lines()
    title = f"Patch features of {len(pictures)} images as colours"
    figures.save(draw_components(pictures, found, title, smooth=args.smooth), out)
    print(f"{out}: {title}")
    for one in found:
        print(f"  {one.heading}: {one.describe()}")
    print(*(f"  {note}" for note in notes), sep="\n", end="\n" if notes else "")
    return 0


def _coloured(side: Side, source: PictureSource, args: argparse.Namespace) -> tuple[list[Picture], ColouredMaps]:
    encoded = [(side.encoder.map(batch).cpu(), pictures) for batch, pictures in source.batches(args.limit)]
    maps = torch.cat([part for part, _ in encoded])
    shown = foreground(maps) if args.foreground else None
    colours, shares = component_colours(maps, shown)
    return [picture for _, part in encoded for picture in part], ColouredMaps(side.word, side.heading, colours, shares)
