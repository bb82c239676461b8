"""Options and steps of commands that run a model: image size, weights, precision, device, finite results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ssmpretrain import __version__
from ssmpretrain.base.environment import environment_number
from ssmpretrain.base.errors import UserError

_CPU = torch.device("cpu")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options for image size, weights, precision and device."""
    parser.add_argument("--image-size", type=int, help="side in pixels (default: as in training)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights, or with --no-ema the weights in training (default: the weights that "
        "the run reports)",
    )
    parser.add_argument(
        "--precision", choices=("32", "bf16"), default="32", help="bf16: mixed, as bf16-mixed of fit (default: 32)"
    )
    add_device(parser)


def add_teacher(parser: argparse._ActionsContainer) -> None:
    """Add `--teacher`."""
    parser.add_argument(
        "--teacher",
        action=argparse.BooleanOptionalAction,
        help="the teacher of a run of DINO, or with --no-teacher its student (default: the teacher, if there is one)",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: a GPU if there is one)")


def choose_device(name: str, *, where: str) -> torch.device:
    """Return the device with a name. "auto" is a GPU if there is one; under torchrun it is the GPU of this process.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda", environment_number("LOCAL_RANK", 0)) if torch.cuda.is_available() else _CPU
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{where}: --device is auto, cpu, cuda or cuda:N; {name} cannot be used ({str(error).splitlines()[0]}). "
            "Leave it out."
        ) from error
    return device


def set_size(encoder: Any, name: str, given: int | None, trained_on: Any, *, where: str) -> tuple[int, int]:
    """Set the image size of an encoder, and return it as H, W in pixels.

    Args:
        encoder: The encoder.
        name: Name of the encoder, for messages.
        given: Side in pixels that the user asks for; None for the size in training.
        trained_on: Image size in training, as read from a file.
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If the size is invalid, or the encoder's stride does not divide it.
    """
    from ssmpretrain.datamodules.decoding.augmentation import check_image_size  # torchvision takes seconds to import

    size = check_image_size(trained_on if given is None else given, where)
    stride = encoder.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        near = max(1, round(size[0] / stride)) * stride
        raise UserError(
            f"{where}: {name} takes images whose sides are multiples of {stride} pixels; got {size[0]} x {size[1]}. "
            f"Set --image-size {near}, say."
        )
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=size)
    return size


def encode(
    model: Callable[[Tensor], Tensor], batch: Tensor, precision: str, *, what: str, path: object, where: str
) -> Tensor:
    """Encode a batch in the precision "32" or "bf16"; return the result in float32.

    Args:
        model: Function from the batch to features or embeddings.
        batch: Images or tokens, on the device of the model.
        precision: "32" or "bf16".
        what: Name of the results, for messages.
        path: File of the model, for messages.
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If a result is not finite.
    """
    with _autocast(precision, batch.device):
        encoded = model(batch)
    if not encoded.isfinite().all():
        raise UserError(
            f"{where}: {what} are finite numbers; those of {path} are not. Try --precision 32, or another checkpoint."
        )
    return encoded.float()


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def protocol_of(encoder: Any) -> dict[str, Any]:
    """Return the settings that decide the results of a model, as plain data: images, precision, versions."""
    return {
        "images": encoder.images,
        "precision": encoder.precision,
        "ssmpretrain": __version__,
        "torch": torch.__version__,
    }
