"""The encoders of a picture: the one that the command names, and before it another one to compare with."""

from __future__ import annotations

import argparse
from copy import copy
from typing import NamedTuple

from ssmpretrain.commands.shared.frozen_encoder import FrozenEncoder, load_frozen

UNTRAINED = "untrained"


class Side(NamedTuple):
    """An encoder of a picture, and the word that stands beside its rows; empty if there is only one encoder."""

    word: str
    encoder: FrozenEncoder

    @property
    def heading(self) -> str:
        """The line that says which encoder and weights these are."""
        return f"{self.word}: {self.encoder.title}" if self.word else self.encoder.title


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--before`."""
    parser.add_argument(
        "--before",
        metavar="RUN_OR_CKPT",
        help=f"also draw the features of this encoder, first; {UNTRAINED}: of the same architecture with fresh weights",
    )


def load_sides(args: argparse.Namespace, *, where: str) -> list[Side]:
    """Load the encoder of the command, and before it that of `--before` if there is one.

    The choice of weights (`--ema`, `--teacher`) is for the encoder of the command; that of `--before` has its default
    weights.
    """
    encoder = load_frozen(args, where=where)
    if args.before is None:
        return [Side("", encoder)]
    return [Side("before", _before(args, encoder, where)), Side("after", encoder)]


def _before(args: argparse.Namespace, encoder: FrozenEncoder, where: str) -> FrozenEncoder:
    if args.before == UNTRAINED:
        return encoder.untrained()
    other = copy(args)
    other.checkpoint, other.ema, other.teacher = args.before, None, None
    return load_frozen(other, where=where)
