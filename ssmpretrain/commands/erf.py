"""`erf`: the effective receptive field of an encoder, before and after training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared import figures
from ssmpretrain.commands.shared.encoding import choose_device, set_size
from ssmpretrain.datamodules.decoding.named_images import find_named_images, load_images, photograph_crops
from ssmpretrain.encoders import LoadReport, create_encoder, load_encoder
from ssmpretrain.encoders.features.receptive_field import ReceptiveField, Square, receptive_field, smallest_square
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images, images_of
from ssmpretrain.objectives.masked.pretraining import Pretraining
from ssmpretrain.objectives.restore import restore

_MOST_IMAGES = 100_000  # all are held in memory at once
_SHARES = (0.2, 0.5, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", help="a run folder, or any file that load_encoder reads")
    parser.add_argument(
        "images", nargs="*", help="image files or folders; without any, crops of scikit-learn's two photographs"
    )
    parser.add_argument("--image-size", type=int, help="side in pixels (default: as in training)")
    parser.add_argument("--num-images", type=int, default=50, help="images to average over (default: %(default)s)")
    figures.add_arguments(parser, out="erf.png")


def run(args: argparse.Namespace) -> int:
    """Draw the receptive fields before and after training, and print the smallest squares that hold most of each."""
    out = figures.check_out(args.out, force=args.force, where="erf")
    device = choose_device(args.device, where="erf")
    if not 1 <= args.num_images <= _MOST_IMAGES:
        raise UserError(f"erf: --num-images is from 1 to {_MOST_IMAGES:,}; got {args.num_images}. 50 is usual.")
    name, encoders, trained_on = _load(weights_in(args.checkpoint))
    for encoder in encoders.values():
        size = set_size(encoder, name, args.image_size, trained_on["size"], where="erf")
    images = _images(args, size, trained_on["mean"], trained_on["std"]).to(device)
    fields = {title: receptive_field(encoder.to(device).eval(), images) for title, encoder in encoders.items()}
    squares = {title: [smallest_square(field, share) for share in _SHARES] for title, field in fields.items()}
    figures.save(draw_fields(fields, squares), out)
    print(f"{out}: effective receptive field of {name}, {len(images)} images of {size[0]} x {size[1]}")
    print(f"  {'smallest square that holds':<28}" + "".join(f"{share:>17.0%}" for share in _SHARES))
    for title, found in squares.items():
        print(f"  {title:<28}" + "".join(f"{_measure(square, size):>17}" for square in found))
    return 0


def _load(path: Path) -> tuple[str, dict[str, nn.Module], dict[str, Any]]:
    """Return the encoder's name, encoders with fresh and with loaded weights by title, and the image preparation."""
    content = read_content(path)
    run = restore(content, path, Pretraining)  # type: ignore[type-abstract]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if run is not None:
            name, after, before = run.model.encoder_name, run.model.encoder, run.model.build_encoder()
        else:
            after = load_encoder(path, num_classes=0)
            report = cast(LoadReport, after.load_report)
            name, before = report.encoder, create_encoder(report.encoder, **report.args)
    images = checked_images(content.get("images") if isinstance(content, dict) else None, path)
    return name, {"before training": before, "after training": after}, {**images_of(after), **images}


def _images(args: argparse.Namespace, size: tuple[int, int], mean: Any, std: Any) -> Tensor:
    if not args.images:
        return photograph_crops(args.num_images, size, mean, std)
    paths = find_named_images(args.images, args.num_images, where="erf")[: args.num_images]
    return load_images(paths, size, mean, std, where="erf")


def draw_fields(fields: dict[str, ReceptiveField], squares: dict[str, list[Square]]) -> Figure:
    """Draw receptive fields side by side under their titles, with the squares that hold most of each field.

    The colour is log10(1 + contribution), divided by its largest value in the panel, as published.
    """
    H, W = next(iter(fields.values())).contributions.shape
    figure = Figure(figsize=(5.55, 0.8 + 2.2 * H / W), dpi=300, layout="constrained")  # inches; a page's text width
    axes = figure.subplots(1, len(fields))
    for axis, (title, field) in zip(axes, fields.items(), strict=True):
        logarithm = (field.contributions + 1).log10().numpy()
        picture = axis.imshow(logarithm / logarithm.max(), vmin=0, vmax=1, cmap="viridis", extent=(0, W, H, 0))
        axis.set_title(title, size=8)
        axis.locator_params(nbins=5)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("\n".join(_measures(squares[title], (H, W))), size=7)
        for square in squares[title]:
            _outline(axis, square)
    axes[0].set_ylabel("pixels", size=7)
    bar = figure.colorbar(picture, cax=axes[-1].inset_axes((1.05, 0, 0.06, 1)))
    bar.set_label("log$_{10}$(1 + contribution) / maximum", size=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def _outline(axis: Axes, square: Square) -> None:
    axis.add_patch(
        Rectangle((square.left, square.top), square.width, square.height, fill=False, edgecolor="white", linewidth=0.7)
    )


def _measures(squares: list[Square], size: tuple[int, int]) -> list[str]:
    return [f"{share:.0%} in {_measure(square, size)}" for share, square in zip(_SHARES, squares, strict=True)]


def _measure(square: Square, size: tuple[int, int]) -> str:
    """Format the side of a square in pixels, and its share of the area of the image."""
    return f"{square.side} px ({square.height * square.width / (size[0] * size[1]):.1%})"
