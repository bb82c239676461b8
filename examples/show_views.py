"""A picture of the views that a recipe makes of an image.

    python examples/show_views.py views.png                                       # DINO's views of a photograph
    python examples/show_views.py views.png --recipe my_recipe.yaml --image photo.jpg

Each row is a new draw, as in a new epoch. Global views come first; small views stand below one another.
"""

import argparse
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import random_state_kept
from ssmpretrain.base.yaml_files import read_recipe
from ssmpretrain.datamodules import ImageData, ImageFolder, ViewGroup
from ssmpretrain.datamodules.decoding import Photometric, ViewsTransform, decode_rgb

GAP = 6  # pixels between two views


def dino_data() -> ImageData:
    """Return a data module with the two global and eight local views of DINO and iBOT; it never reads its folder."""

    def colours(blur: float, solarize: float = 0.0) -> Photometric:
        jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_probability": 0.8}
        return Photometric(**jitter, grayscale_probability=0.2, blur_probability=blur, solarize_probability=solarize)

    views = [
        ViewGroup(1, crop_scale=(0.4, 1.0), photometric=colours(1.0)),
        ViewGroup(1, crop_scale=(0.4, 1.0), photometric=colours(0.1, solarize=0.2)),
        ViewGroup(8, size=96, crop_scale=(0.05, 0.4), local=True, photometric=colours(0.5)),
    ]
    return ImageFolder("images", image_size=224, views=views)


def data_of(recipe: str) -> ImageData:
    """Build the data module of a recipe; nothing is read from the disk but the recipe.

    Args:
        recipe: A YAML file with a section `data`.
    """
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageData, "data")
    data: ImageData = parser.instantiate(parser.parse_object({"data": read_recipe(recipe)["data"]})).data
    if data.views is None:
        raise SystemExit(f"show_views: {recipe} makes one view of an image; got data.views null. Set data.views.")
    return data


def grid(views: list[list[list[Tensor]]]) -> Image.Image:
    """Draw the views of several draws, (3, H, W) uint8 each: one row for each draw, small views in columns."""
    height = views[0][0][0].shape[1]
    rows = []
    for draw in views:
        columns = []
        for of_size in draw:
            fitting = max(1, (height + GAP) // (of_size[0].shape[1] + GAP))  # views in one column
            columns += [of_size[start : start + fitting] for start in range(0, len(of_size), fitting)]
        rows.append(columns)
    width = max(sum(column[0].shape[2] + GAP for column in columns) for columns in rows) - GAP
    picture = Image.new("RGB", (width, len(rows) * (height + GAP) - GAP), "white")
    for row, columns in enumerate(rows):
        left = 0
        for column in columns:
            for number, view in enumerate(column):
                top = row * (height + GAP) + number * (view.shape[1] + GAP)
                picture.paste(F.to_pil_image(view), (left, top))
            left += column[0].shape[2] + GAP
    return picture


def main(out: str, recipe: str | None = None, image: str | None = None, rows: int = 4) -> None:
    """Write the picture.

    Args:
        out: The file to write, a PNG or JPEG.
        recipe: Recipe that sets `data.views`; None for DINO's views.
        image: Image file; None for a photograph of scikit-learn.
        rows: Number of draws, at least 1.
    """
    data = dino_data() if recipe is None else data_of(recipe)
    if image is None:
        pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    else:
        pixels = decode_rgb(Path(image).read_bytes())
    assert data.views is not None
    transform = ViewsTransform(data.views, data.augmentation, "show_views")
    with random_state_kept():
        picture = grid([transform(pixels, seed=number) for number in range(rows)])
    picture.save(out)
    count = sum(group.count for group in data.views)
    print(f"{rows} draws of {transform.num_global} global and {count - transform.num_global} local views: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--recipe")
    parser.add_argument("--image")
    parser.add_argument("--rows", type=int, default=4)
    main(**vars(parser.parse_args()))
