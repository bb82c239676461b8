"""`pca`: draw the patch features of images as colours, by their three principal components."""

from __future__ import annotations

import argparse

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import counted
from ssmpretrain.commands.feature_pictures import images as named
from ssmpretrain.commands.feature_pictures import sides
from ssmpretrain.commands.feature_pictures.coloured_maps import ColouredMaps, colour_maps
from ssmpretrain.commands.feature_pictures.component_sheet import draw_components
from ssmpretrain.commands.feature_pictures.images import Picture, open_images
from ssmpretrain.commands.feature_pictures.sides import load_sides
from ssmpretrain.commands.shared import figures, frozen_encoder

_MOST_IMAGES = 64  # that a person can look at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser, pooled=False)
    named.add_arguments(parser)
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
        images = list(source.batches(args.limit))
        pictures = [picture for _, part in images for picture in part]
        found.append(colour_maps(side.word, side.heading, side.encoder.map, images, foreground_alone=args.foreground))
        notes = [*_left_out(len(source), args.limit), *source.lines()]
    title = f"Patch features of {counted(len(pictures), 'image')} as colours"
    figures.save(draw_components(pictures, found, title, smooth=args.smooth), out)
    print(f"{out}: {title}")
    print(*(f"  {line}" for line in (*(f"{one.heading}; {one.describe()}" for one in found), *notes)), sep="\n")
    return 0


def _left_out(there: int, limit: int) -> list[str]:
    return [f"{limit} of {there:,} images, evenly spread; --limit takes more"] if there > limit else []
