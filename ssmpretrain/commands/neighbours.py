"""`neighbours`: draw images beside their nearest neighbours among frozen features."""

from __future__ import annotations

import argparse

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import counted
from ssmpretrain.commands.feature_pictures import images
from ssmpretrain.commands.feature_pictures import sides as compared
from ssmpretrain.commands.feature_pictures.images import PictureSource, check_count, open_images
from ssmpretrain.commands.feature_pictures.neighbour_search import Neighbourhood, search, table
from ssmpretrain.commands.feature_pictures.neighbour_sheet import draw_neighbours
from ssmpretrain.commands.feature_pictures.sides import Side, load_sides
from ssmpretrain.commands.shared import figures, frozen_encoder

_QUERIES, _MOST_QUERIES, _MOST_NEIGHBOURS = 8, 64, 32  # people look at a few


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser)
    images.add_arguments(parser)
    parser.add_argument(
        "--queries", nargs="+", metavar="PATH", help="images whose neighbours are drawn (default: some of IMAGES)"
    )
    parser.add_argument(
        "--num-queries",
        type=int,
        help=f"number of queries, evenly spread (default: {_QUERIES} of IMAGES, or all of --queries, at most "
        f"{_MOST_QUERIES})",
    )
    parser.add_argument("--k", type=int, default=8, help="neighbours of each query (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="search only this many of IMAGES, evenly spread (default: all)")
    compared.add_argument(parser)
    figures.add_out(parser, "neighbours.png")


def run(args: argparse.Namespace) -> int:
    """Draw the neighbours of each query by each encoder, and print how many have the class of their query."""
    _check(args)
    out = figures.check_out(args.out, force=args.force, where="neighbours")
    found, notes = list[Neighbourhood](), list[str]()
    for side in (sides := load_sides(args, where="neighbours")):
        bank = open_images(args.images, args, side.encoder)
        queries = open_images(args.queries, args, side.encoder, "the queries") if args.queries else bank
        found.append(_search(side, queries, bank, args))
        notes = _notes(queries, bank, args)
    title = f"Nearest neighbours of {counted(len(found[0].rows), 'image')} among {found[0].searched:,}"
    figures.save(draw_neighbours(found, title), out)
    print(f"{out}: {title}")
    print(*(f"  {_described(side)}" for side in sides), *table(found), *(f"  {note}" for note in notes), sep="\n")
    return 0


def _search(side: Side, queries: PictureSource, bank: PictureSource, args: argparse.Namespace) -> Neighbourhood:
    asked = bank.labelled(queries.batches(_num_queries(args)))
    heading = f"{side.heading}, {side.encoder.feature}"
    found = search(side.word, heading, side.encoder, asked, bank.batches(args.limit), args.k)
    if not any(row.near for row in found.rows):
        raise UserError(
            f"neighbours: an image is compared with others, so 2 usable images are needed; got {found.searched} in "
            f"{' '.join(args.images)[:200]}. Name more images."
        )
    return found


def _described(side: Side) -> str:
    """Return the line of an encoder, with the kind of its features and the reason for it."""
    return f"{side.heading}; {side.encoder.feature}: {side.encoder.reason}"


def _num_queries(args: argparse.Namespace) -> int:
    return args.num_queries or (_MOST_QUERIES if args.queries else _QUERIES)


def _notes(queries: PictureSource, bank: PictureSource, args: argparse.Namespace) -> list[str]:
    """Return lines about images that were not searched, not asked for, or not usable."""
    notes = []
    if args.limit is not None and args.limit < len(bank):
        notes.append(f"searched {args.limit:,} of {len(bank):,} images, evenly spread")
    if args.queries and _num_queries(args) < len(queries):
        notes.append(f"took {_num_queries(args)} of {len(queries):,} queries, evenly spread")
    return notes + [line for source in dict.fromkeys((queries, bank)) for line in source.lines()]


def _check(args: argparse.Namespace) -> None:
    check_count(args.limit, "--limit", where="neighbours")
    for option, value, most in (("--num-queries", args.num_queries, _MOST_QUERIES), ("--k", args.k, _MOST_NEIGHBOURS)):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"neighbours: {option} is from 1 to {most}; got {value}. 8 is usual.")
