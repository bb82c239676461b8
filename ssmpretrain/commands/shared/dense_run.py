"""Runs of dense tasks: options, the restored objective, names of its classes, preparation of images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared import trusted_classes
from ssmpretrain.commands.shared.encoding import add_device, choose_device
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.objectives import Objective
from ssmpretrain.objectives.restore import restore

T = TypeVar("T", bound=Objective)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the run and decide how its images are prepared."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="a run folder, or a checkpoint of fit")
    parser.add_argument(
        "--eval-size",
        nargs=2,
        type=int,
        metavar=("SHORT", "LONGEST"),
        help="resize images so that the short side has SHORT pixels, unless the long side would have more than LONGEST "
        "(default: as in the validation of the run)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights, or with --no-ema the weights in training (default: the weights that "
        "the run reports)",
    )
    add_device(parser)
    trusted_classes.add_argument(parser, "the checkpoint")


@dataclass(frozen=True)
class DenseRun(Generic[T]):
    """An objective with labels for pixels or objects, ready to predict.

    Attributes:
        model: The objective, in evaluation mode, on `device`.
        path: The checkpoint.
        classes: Names of the classes, in the order of their numbers.
        eval_size: Short side, and longest side, of the images in pixels.
        antialias: Whether images are smoothed before they are made smaller.
        mean, std: Mean and standard deviation of each channel, for images in [0, 255], (3, 1, 1).
        device: Device of the model.
    """

    model: T
    path: Path
    classes: list[str]
    eval_size: tuple[int, int]
    antialias: bool
    mean: Tensor
    std: Tensor
    device: torch.device

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and normalise an image (3, H, W) uint8, as validation does; return (1, 3, h, w), float32."""
        from ssmpretrain.datamodules.targets.resizing import fitted_size, resize_image

        size = fitted_size((image.shape[1], image.shape[2]), *self.eval_size)
        resized = resize_image(image, size, antialias=self.antialias)
        return ((resized - self.mean) / self.std).unsqueeze(0).to(self.device)

    def __str__(self) -> str:
        return f"{type(self.model).__name__} of {self.model.encoder_name}, {len(self.classes)} classes"


def load_dense_run(args: argparse.Namespace, kind: type[T], other: str, *, where: str) -> DenseRun[T]:
    """Load the run that the arguments of `add_arguments` name.

    Args:
        args: The arguments.
        kind: Class of the objective.
        other: Name of the command for other runs, for messages.
        where: Start of error messages, such as the name of a command.

    Raises:
        UserError: If the file is no checkpoint of such a run, or does not say how images are prepared.
    """
    device = choose_device(args.device, where=where)
    trusted_classes.import_modules(args.trust, where=where)
    content = read_content(path := weights_in(args.checkpoint))
    run = restore(content, path, kind, args.ema)
    if run is None:
        name = content.get("objective") if isinstance(content, dict) else None
        what = f"is of a run of {name}" if isinstance(name, str) else "is of no run"
        raise UserError(
            f"{where}: a checkpoint of a run of {kind.__name__} holds encoder, head and classes; {path} {what}. "
            f"Train one with fit, or see `ssmpretrain {other} --help`."
        )
    images = content.get("images") or {}
    if missing := [name for name in ("size", "mean", "std") if images.get(name) is None]:
        raise UserError(
            f"{where}: a checkpoint describes the preparation of its images; {path} does not say their "
            f"{' and '.join(missing)}. Train with a data module that has image_size, mean and std."
        )
    mean, std = (255 * torch.tensor(images[name]).view(3, 1, 1) for name in ("mean", "std"))
    size = _eval_size(args.eval_size or images.get("eval_size"), images["size"], where)
    return DenseRun(
        run.model.to(device),
        path,
        _names(content, run.model, path, where),
        size,
        images.get("antialias", False),
        mean,
        std,
        device,
    )


def _eval_size(given: Any, trained_on: list[int], where: str) -> tuple[int, int]:
    from ssmpretrain.datamodules.targets.resizing import check_fitted_size

    short = min(trained_on)
    return check_fitted_size(given or (short, 4 * short), "--eval-size", where)


def _names(content: dict[str, Any], model: Any, path: Path, where: str) -> list[str]:
    """Return the names of the classes, or numbers if the data of the run had no names."""
    names = content.get("classes") or [str(number) for number in range(model.num_classes)]
    if not isinstance(names, list) or len(names) != model.num_classes:
        raise UserError(
            f"{where}: a checkpoint names its {model.num_classes} classes; {path} has {names!r:.60}. Train it anew."
        )
    return list(map(str, names))
