"""How a command encodes: options that the commands with one encoder and those with two towers share."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ssmpretrain.commands.shared import devices


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the size of the images, which weights, the precision and the device."""
    parser.add_argument("--image-size", type=int, help="side in pixels (default: as in training)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights, or the weights in training; without either, what the file calls "
        "its model",
    )
    parser.add_argument(
        "--precision", choices=("32", "bf16"), default="32", help="bf16: mixed, as bf16-mixed of fit (default: 32)"
    )
    devices.add_argument(parser)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context that computes in the precision "32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
