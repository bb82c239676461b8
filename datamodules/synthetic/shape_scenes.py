"""Scenes of shapes: classes, sizes, places and relations, and the scenes of training and validation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeVar

from ssmpretrain.base.seeds import random_generator

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
COUNTS = (2, 3, 4)
RELATIONS = ("above", "below", "left of", "right of")
CLASSES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))

_KINDS = (0.5, 0.2, 0.3)  # fractions of the training scenes: one object, several equal ones, two in a relation
MOST_VALIDATION = 4000  # the number of different scenes is limited

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """Content of a picture: one object, two to four equal objects, or two different objects in a relation.

    Args:
        objects: Class of each object, a number of `CLASSES`.
        size: Size of a single object, one of `SIZES`; empty for several objects.
        place: Place of a single object, one of `PLACES`; empty for several objects.
        relation: Relation of the first of two different objects to the second, one of `RELATIONS`; otherwise empty.
    """

    objects: tuple[int, ...]
    size: str = ""
    place: str = ""
    relation: str = ""

    @property
    def label(self) -> int | None:
        """Class of the object in a scene of one object; None for other scenes."""
        return self.objects[0] if len(self.objects) == 1 else None


def held_out_classes(seed: int) -> list[int]:
    """Return the classes that training never shows: one for each colour, and one or two for each shape."""
    rng = random_generator("held out", seed)
    shapes = [*rng.permutation(len(SHAPES)).tolist(), *rng.permutation(len(SHAPES)).tolist()]
    colours = rng.permutation(len(COLOURS)).tolist()
    return sorted(colour * len(SHAPES) + shape for colour, shape in zip(colours, shapes, strict=False))


def training_scenes(count: int, seed: int) -> Iterator[Scene]:
    """Yield `count` scenes of the classes that are not held out."""
    rng = random_generator("training scenes", seed)
    seen = sorted(set(range(len(CLASSES))) - set(held_out_classes(seed)))

    def draw(choices: tuple[T, ...]) -> T:
        return choices[int(rng.integers(len(choices)))]

    for kind in rng.choice(len(_KINDS), size=count, p=_KINDS).tolist():
        first, second = rng.choice(seen, size=2, replace=False).tolist()
        if kind == 0:
            yield Scene((first,), size=draw(SIZES), place=draw(PLACES))
        elif kind == 1:
            yield Scene((first,) * draw(COUNTS))
        else:
            yield Scene((first, second), relation=draw(RELATIONS))


def validation_scenes(count: int, seed: int) -> list[Scene]:
    """Return scenes of all classes in a mixed order; no two scenes have the same meaning.

    About half of the scenes show one object, the same number for each class; the others show several objects. With
    fewer than 96 scenes, some classes do not appear alone.

    Args:
        count: Number of scenes, at least 1 and at most `MOST_VALIDATION`.
        seed: Decides the scenes.
    """
    rng = random_generator("validation scenes", seed)

    def some(scenes: list[Scene], number: int) -> list[Scene]:
        return [scenes[i] for i in rng.permutation(len(scenes))[:number].tolist()]

    chosen: list[Scene] = []
    for label in range(len(CLASSES)):
        variants = [Scene((label,), size, place) for size, place in product(SIZES, PLACES)]
        chosen += some(variants, max(1, count // (2 * len(CLASSES))))
    chosen = some(chosen, -(-count // 2)) if count < 2 * len(CLASSES) else chosen
    groups = [Scene((label,) * number) for label, number in product(range(len(CLASSES)), COUNTS)]
    chosen += some(groups, (count - len(chosen)) // 4)
    pairs = [
        Scene(pair, relation=relation) for pair, relation in product(combinations(range(len(CLASSES)), 2), RELATIONS)
    ]
    chosen += some(pairs, count - len(chosen))
    return some(chosen, count)
