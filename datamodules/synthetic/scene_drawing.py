"""Drawing of scenes: overlapping shapes over clutter and photographs, with the visible pixels of each object.

A class is a shape. Colour, size, rotation and background are drawn independently of it. Lengths are fractions
of the side of the picture.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ssmpretrain.datamodules.synthetic.shape_drawing import FINE, Pixels, Placed, coverage, shape_of
from ssmpretrain.datamodules.synthetic.shape_scenes import SHAPES

MOST_OBJECTS = 2  # in a scene
_RADII = (0.22, 0.36)
_TURN = 0.5  # radians to either side
_CLUTTER = 3  # lines and dots behind the objects, at most
_VISIBLE = 0.5  # least fraction of an object that later objects leave visible


@dataclass(frozen=True)
class DrawnScene:
    """A picture and its objects.

    Args:
        image: The picture, (size, size, 3), uint8.
        shapes: Shape of each object, a number of `SHAPES`, in the order of drawing: a later one covers earlier ones.
        visible: Number of the object that each pixel shows, counted from 1, or 0 for the background: (size, size).
    """

    image: NDArray[np.uint8]
    shapes: list[int]
    visible: NDArray[np.uint8]

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Return the visible pixels of an object, counted from 0: (size, size)."""
        return np.asarray(self.visible == number + 1)

    def class_map(self) -> NDArray[np.uint8]:
        """Return the class of each pixel, (size, size): 0 for the background, and 1 + shape for an object."""
        return np.array([0, *(shape + 1 for shape in self.shapes)], dtype=np.uint8)[self.visible]


def draw_scene(photographs: list[Image.Image], size: int, rng: np.random.Generator) -> DrawnScene:
    """Draw one or two objects over a crop of a photograph with lines and dots.

    Args:
        photographs: Photographs for the background, at least 48 pixels wide and high.
        size: Side of the picture in pixels.
        rng: Decides everything.
    """
    picture = _clutter(_background(photographs, size, rng), rng)
    count = 1 + int(rng.integers(MOST_OBJECTS))
    while True:
        objects = [_placed(rng) for _ in range(count)]
        covers = [coverage([thing], size) for thing in objects]
        visible = _visible(covers)
        if all(
            np.count_nonzero(visible == number) >= max(1, _VISIBLE * np.count_nonzero(cover > 0.5))
            for number, cover in enumerate(covers, start=1)
        ):
            break
    for cover in covers:
        picture = picture + cover * (_colour(rng) - picture)
    image = (picture * 255).round().astype(np.uint8)
    return DrawnScene(image, [SHAPES.index(shape_of(thing)) for thing in objects], visible)


def _placed(rng: np.random.Generator) -> Placed:
    """Choose shape and place of an object; up to a fifth of its radius may lie outside the picture."""
    radius = float(rng.uniform(*_RADII))
    x, y = rng.uniform(0.8 * radius, 1 - 0.8 * radius, 2).tolist()
    return Placed(int(rng.integers(len(SHAPES))), x, y, radius, float(rng.uniform(-_TURN, _TURN)))


def _visible(covers: list[Pixels]) -> NDArray[np.uint8]:
    """Return the number of the last object that covers more than half of each pixel, counted from 1, else 0."""
    visible = np.zeros(covers[0].shape[:2], dtype=np.uint8)
    for number, cover in enumerate(covers, start=1):
        visible[cover[..., 0] > 0.5] = number
    return visible


def _background(photographs: list[Image.Image], size: int, rng: np.random.Generator) -> Pixels:
    """Return a random square of a photograph with moderate brightness and contrast: (size, size, 3), in [0, 1]."""
    photo = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(48, min(photo.size) + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box), dtype=np.float32) / 255
    mean = pixels.mean(axis=(0, 1))
    picture: Pixels = (0.42 + 0.6 * (pixels - mean) + 0.35 * (mean - 0.42)).clip(0, 1)
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def _clutter(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw up to three lines and dots."""
    side = len(picture) * FINE
    for _ in range(int(rng.integers(_CLUTTER + 1))):
        fine = Image.new("L", (side, side))
        pencil = ImageDraw.Draw(fine)
        x, y = (rng.random(2) * side).tolist()
        if rng.random() < 0.6:
            angle, length = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.1, 0.5)) * side
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pencil.line((x, y, *end), fill=255, width=round(float(rng.uniform(0.015, 0.04)) * side))
        else:
            radius = float(rng.uniform(0.02, 0.05)) * side
            pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        ink = np.asarray(fine.reduce(FINE), dtype=np.float32)[..., None] / np.float32(255)
        picture = picture + ink * (_colour(rng) - picture)
    return picture


def _colour(rng: np.random.Generator) -> Pixels:
    """Return any colour that is neither grey nor dark: (3,), in [0, 1]."""
    hue, saturation, value = float(rng.random()), float(rng.uniform(0.3, 1)), float(rng.uniform(0.45, 1))
    return np.asarray(hsv_to_rgb(hue, saturation, value), dtype=np.float32)
