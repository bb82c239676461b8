"""`neighbours`: draw images beside their nearest neighbours among frozen features."""

from __future__ import annotations

import argparse

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.feature_pictures import images, sides
from ssmpretrain.commands.feature_pictures.images import PictureSource, check_count, open_images
from ssmpretrain.commands.feature_pictures.neighbour_search import Neighbourhood, search, table
from ssmpretrain.commands.feature_pictures.neighbour_sheet import draw_neighbours
from ssmpretrain.commands.feature_pictures.sides import Side, load_sides
from ssmpretrain.commands.shared import figures, frozen_encoder

_MOST_QUERIES, _MOST_NEIGHBOURS = 64, 32  # that a person can look at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser)
    images.add_arguments(parser)
    parser.add_argument(
        "--queries", nargs="+", metavar="PATH", help="images whose neighbours are drawn (default: some of IMAGES)"
    )
    parser.add_argument(
        "--num-queries", type=int, default=8, help="number of queries, evenly spread (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, default=8, help="neighbours of each query (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="search only this many of IMAGES, evenly spread (default: all)")
    sides.add_argument(parser)
    figures.add_out(parser, "neighbours.png")


def run(args: argparse.Namespace) -> int:
    """Draw the neighbours of each query by each encoder, and print how many have the class of their query."""
    _check(args)
    out = figures.check_out(args.out, force=args.force, where="neighbours")
    found, notes = list[Neighbourhood](), list[str]()
    for side in load_sides(args, where="neighbours"):
        bank = open_images(args.images, args, side.encoder)
        queries = open_images(args.queries, args, side.encoder, "the queries") if args.queries else bank
        found.append(_search(side, queries, bank, args))
        notes = [line for source in dict.fromkeys((queries, bank)) for line in source.lines()]
    title = f"{len(found[0].rows)} images and their nearest neighbours among {found[0].searched:,}"
    figures.save(draw_neighbours(found, title), out)
    print(f"{out}: {title}")
    print(*(f"  {one.heading}" for one in found), *table(found), *(f"  {note}" for note in notes), sep="\n")
    return 0


def _search(side: Side, queries: PictureSource, bank: PictureSource, args: argparse.Namespace) -> Neighbourhood:
    found = search(
        side.word, side.heading, side.encoder, queries.batches(args.num_queries), bank.batches(args.limit), args.k
    )
    if not any(row.near for row in found.rows):
        raise UserError(
            f"neighbours: an image is compared with others, so 2 usable images are needed; got {found.searched} in "
            f"{' '.join(args.images)[:200]}. Name more images."
        )
    return found


def _check(args: argparse.Namespace) -> None:
    check_count(args.limit, "--limit", where="neighbours")
    for option, value, most in (("--num-queries", args.num_queries, _MOST_QUERIES), ("--k", args.k, _MOST_NEIGHBOURS)):
        if not 1 <= value <= most:
            raise UserError(f"neighbours: {option} is from 1 to {most}; got {value}. 8 is usual.")
