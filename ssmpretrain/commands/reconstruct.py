"""`reconstruct`: draw a pretrained model's predictions of the hidden parts of images."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.callbacks.reconstructions import draw_columns
from ssmpretrain.commands.shared import figures, trusted_classes
from ssmpretrain.commands.shared.encoding import choose_device
from ssmpretrain.datamodules.decoding.augmentation import check_image_size
from ssmpretrain.datamodules.decoding.named_images import find_named_images, load_images
from ssmpretrain.encoders.weights.preprocessing import checked_images
from ssmpretrain.objectives.masked.pretraining import Reconstruction
from ssmpretrain.objectives.restore import load_objective

_PER_FOLDER = 8
_MAX_ROWS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", help="a run folder, or a checkpoints/last.ckpt of fit")
    parser.add_argument(
        "images", nargs="+", help=f"image files, or folders, of which the first {_PER_FOLDER} images are taken"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what is hidden (default: %(default)s)")
    figures.add_arguments(parser, out="reconstruction.png")
    trusted_classes.add_argument(parser, "the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Draw one row per image, and print the loss of each image."""
    out = figures.check_out(args.out, force=args.force, where="reconstruct")
    device = choose_device(args.device, where="reconstruct")
    paths = find_named_images(args.images, _PER_FOLDER, where="reconstruct")
    if len(paths) > _MAX_ROWS:
        raise UserError(f"reconstruct: a figure has {_MAX_ROWS} rows at most; got {len(paths)} images. Name fewer.")
    trusted_classes.import_modules(args.trust, where="reconstruct")
    run = load_objective(args.checkpoint)
    size, mean, std = _preparation(run.content, args.checkpoint)
    images = load_images(paths, size, mean, std, where="reconstruct").to(device)
    objective = run.model.to(device)
    with torch.no_grad():
        result = objective.reconstruct(images, torch.Generator(device).manual_seed(args.seed))
        figures.save(draw_columns(objective.pictures(images, result, mean, std)), out)
        losses = [
            float(objective.loss(images[n : n + 1], Reconstruction(*(part[n : n + 1] for part in result))))
            for n in range(len(images))
        ]
    method = f"{type(objective).__name__} of {objective.encoder_name}"
    print(f"{out}: {method}, {len(paths)} images of {size[0]} x {size[1]}")
    for path, loss in zip(paths, losses, strict=True):
        print(f"  loss {loss:8.4f}  {shown(str(path))}")
    print(f"  mean {sum(losses) / len(losses):8.4f}")
    return 0


def _preparation(content: dict[str, Any], name: str) -> tuple[tuple[int, int], list[float], list[float]]:
    """Return size, mean and standard deviation of the images that a checkpoint was trained on."""
    if "images" not in content:
        raise UserError(
            f"reconstruct: a checkpoint describes the preparation of its images; {name} does not. "
            "Train with a data module that has image_size, mean and std."
        )
    images = checked_images(content["images"], name)
    if missing := [key for key in ("size", "mean", "std") if images.get(key) is None]:
        raise UserError(f"reconstruct: {name} does not say the {missing[0]} of its images. Train it anew, or go on.")
    return check_image_size(images["size"], "reconstruct"), images["mean"], images["std"]
