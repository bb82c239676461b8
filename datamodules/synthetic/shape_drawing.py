"""Drawing of scenes of shapes: places of the objects, and pixels. Lengths are fractions of the side of the picture."""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ssmpretrain.datamodules.synthetic.shape_scenes import COLOURS, SHAPES, Scene

Pixels = NDArray[np.float32]

FINE = 4  # the outlines are drawn this many times larger, for smooth edges
_HUES = {"red": 0, "yellow": 54, "green": 120, "cyan": 182, "blue": 226, "purple": 274, "pink": 326}  # degrees
_CENTRES = {
    "top left": (0.29, 0.29),
    "top right": (0.71, 0.29),
    "bottom left": (0.29, 0.71),
    "bottom right": (0.71, 0.71),
    "centre": (0.5, 0.5),
}
_STEPS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}  # from the first to the second


@dataclass(frozen=True)
class Placed:
    """One object in a picture.

    Args:
        label: Class of the object, a number of `CLASSES`.
        x, y: Centre of the object, from the left and from the top.
        radius: Radius of the circle around the object.
        angle: Rotation of the object in radians.
    """

    label: int
    x: float
    y: float
    radius: float
    angle: float


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Choose the places of the objects of a scene, so that no object touches another object or the edge."""
    if scene.relation:
        centres, radii = _pair(scene.relation, rng), rng.uniform(0.15, 0.19, 2).tolist()
    elif scene.place:
        centres = [_CENTRES[scene.place]]
        radii = [float(rng.uniform(0.115, 0.145) if scene.size == "small" else rng.uniform(0.21, 0.25))]
    else:
        cells = rng.permutation(9)[: len(scene.objects)].tolist()
        centres = [((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3) for cell in cells]
        radii = [float(rng.uniform(0.115, 0.135))] * len(cells)
    return [
        Placed(label, x + _jitter(rng), y + _jitter(rng), radius, float(rng.uniform(-0.2, 0.2)))
        for label, (x, y), radius in zip(scene.objects, centres, radii, strict=True)
    ]


def draw(objects: list[Placed], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the objects over a background: (size, size, 3), uint8."""
    image = _background(size, rng)
    for label in dict.fromkeys(thing.label for thing in objects):
        ink = coverage([thing for thing in objects if thing.label == label], size)
        image += ink * (_colour(COLOURS[label // len(SHAPES)], rng) - image)
    return (image * 255).round().astype(np.uint8)


def _pair(relation: str, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the centres of two objects, opposite each other along the axis of the relation."""
    along_x, along_y = _STEPS[relation]
    aside = float(rng.uniform(-0.15, 0.15))
    x, y = (0.5 + aside, 0.5) if along_x == 0 else (0.5, 0.5 + aside)
    return [(x - 0.25 * along_x, y - 0.25 * along_y), (x + 0.25 * along_x, y + 0.25 * along_y)]


def _jitter(rng: np.random.Generator) -> float:
    return float(rng.uniform(-0.015, 0.015))


def shape_of(thing: Placed) -> str:
    """Return the shape of an object, one of `SHAPES`."""
    return SHAPES[thing.label % len(SHAPES)]


def coverage(objects: list[Placed], size: int) -> Pixels:
    """Return the fraction of each pixel that the objects of one class cover: (size, size, 1), in [0, 1]."""
    fine = Image.new("L", (size * FINE, size * FINE))
    pencil = ImageDraw.Draw(fine)
    for thing in objects:
        shape = shape_of(thing)
        pencil.polygon(_outline(shape, thing, size * FINE), fill=255)
        if shape == "ring":
            hole = Placed(thing.label, thing.x, thing.y, thing.radius * 0.55, 0)
            pencil.polygon(_outline("circle", hole, size * FINE), fill=0)
    return np.asarray(fine.reduce(FINE), dtype=np.float32)[..., None] / np.float32(255)


def _outline(shape: str, thing: Placed, side: int) -> list[tuple[float, float]]:
    """Return the corners of an object, in pixels of a picture of `side`."""
    return [
        (
            side * (thing.x + thing.radius * radius * math.sin(angle + thing.angle)),
            side * (thing.y - thing.radius * radius * math.cos(angle + thing.angle)),
        )
        for radius, angle in _OUTLINES[shape]
    ]


def _regular(corners: int, *radii: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Return (radius, clockwise angle from the top) of corners at equal angles, whose radii alternate."""
    return [(radii[i % len(radii)], turn + 2 * math.pi * i / corners) for i in range(corners)]


def _cross(width: float) -> list[tuple[float, float]]:
    """Return a plus sign whose bars are `width` wide."""
    half = width / 2
    arm = [(-half, half), (-half, 1.0), (half, 1.0)]  # inner corner and tip of the upward arm, (x, y) upwards
    return [(math.hypot(x, y), math.atan2(x, y) + quarter * math.pi / 2) for quarter in range(4) for x, y in arm]


_OUTLINES = {
    "circle": _regular(40, 0.95),
    "square": _regular(4, 1.1, turn=math.pi / 4),
    "triangle": _regular(3, 1.1),
    "star": _regular(10, 1.1, 0.45),
    "cross": _cross(0.56),
    "ring": _regular(40, 0.95),
}


def _colour(name: str, rng: np.random.Generator) -> Pixels:
    """Return a shade of the colour: (3,), in [0, 1]."""
    hue = _HUES.get(name, 0) / 360 + float(rng.uniform(-0.012, 0.012))
    saturation = 0.03 if name == "white" else 0.5 if name == "pink" else 0.9
    value = float(rng.uniform(0.88, 1.0))
    return np.asarray(hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _background(size: int, rng: np.random.Generator) -> Pixels:
    """Return a dull, rather dark colour, half of the time in soft patches: (size, size, 3), in [0, 1]."""
    dull = hsv_to_rgb(float(rng.random()), float(rng.uniform(0, 0.4)), float(rng.uniform(0.12, 0.45)))
    contrast = float(rng.uniform(0.04, 0.12)) if rng.random() < 0.5 else 0.0
    patches = np.asarray(dull) + contrast * rng.uniform(-1, 1, (6, 6, 3))
    coarse = Image.fromarray((patches.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
