"""The device that a command computes on."""

from __future__ import annotations

import argparse
import os

import torch

from ssmpretrain.base.errors import UserError


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: a GPU if there is one)")


def choose_device(name: str, *, where: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, and under torchrun the one of this process.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else _CPU
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{where}: --device is auto, cpu, cuda or cuda:N; {name} cannot be used ({str(error).splitlines()[0]}). "
            "Leave it out."
        ) from error
    return device


_CPU = torch.device("cpu")
