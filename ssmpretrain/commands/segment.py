"""`segment`: the class of each pixel of images, as pictures for people and as class maps for programs."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.commands.shared import dense_run, pictures
from ssmpretrain.commands.shared.dense_run import load_dense_run
from ssmpretrain.commands.shared.pictures import find_pictures, save_class_map, save_picture
from ssmpretrain.evaluation.dense import Inference, class_colours, draw_segmentation, predict_classes
from ssmpretrain.objectives import Segmentation

_PICTURE, _MAP, _CLASSES = "pictures/{}.png", "maps/{}.png", "classes.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    dense_run.add_arguments(parser)
    pictures.add_arguments(parser, out="segmented")
    inference = parser.add_argument_group("inference", "by default as in the validation of the run")
    inference.add_argument(
        "--slide", action=argparse.BooleanOptionalAction, help="predict in windows, or with --no-slide the whole image"
    )
    inference.add_argument("--window", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of a window, in pixels")
    inference.add_argument("--stride", nargs=2, type=int, metavar=("DOWN", "RIGHT"), help="between windows, in pixels")
    inference.add_argument("--scales", nargs="+", type=float, metavar="RATIO", help="average over resized images")
    inference.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, help="average with the prediction of the mirror image"
    )


def run(args: argparse.Namespace) -> int:
    """Write a picture and a class map of each image, and print the share of its classes."""
    found = find_pictures(args, (_PICTURE, _MAP, _CLASSES), where="segment")
    run = load_dense_run(args, Segmentation, "detect", where="segment")
    inference = _inference(args, run.model.inference)
    colours = class_colours(len(run.classes))
    print(f"{found.out}: {run}")
    for name, image in found.decoded():
        with torch.inference_mode():
            prepared = run.prepare(image)
            classes = predict_classes(run.model, prepared, inference, (image.shape[1], image.shape[2])).cpu()
        save_class_map(classes, colours, found.out / _MAP.format(name))
        save_picture(draw_segmentation(image, classes, run.classes), found.out / _PICTURE.format(name))
        print(f"  {shown(name)}: {_shares(classes, run.classes)}", flush=True)
    replace_json(found.out / _CLASSES, run.classes)
    for line in found.lines():
        print(line)
    return 0


def _inference(args: argparse.Namespace, of_run: Inference) -> Inference:
    """Return the settings of the run with those that the command names."""
    given = {
        "slide": args.slide,
        "window": args.window and tuple(args.window),
        "stride": args.stride and tuple(args.stride),
        "scales": args.scales and tuple(args.scales),
        "flip": args.flip,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if {"window", "stride"} & given.keys() and not given.get("slide", of_run.slide):
        raise UserError(
            "segment: --window and --stride are for windows, and the image is predicted whole. Add --slide."
        )
    return replace(of_run, **given)


def _shares(classes: Tensor, names: list[str]) -> str:
    """Describe the largest classes of an image."""
    counts = classes.flatten().bincount(minlength=len(names))
    order = [int(number) for number in counts.argsort(descending=True, stable=True)[:3] if counts[number]]
    return ", ".join(f"{shown(names[k])} {counts[k] / classes.numel():.0%}" for k in order)
