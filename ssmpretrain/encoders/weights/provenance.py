"""Description of exported weights: the encoder, its training, its images, the sha256 of its tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.encoders.weights.preprocessing import images_of
from ssmpretrain.encoders.weights.state_dict import tensors_sha256

# Entry of an export that holds its description, in every format.
DESCRIPTION = "ssmpretrain"


def describe_weights(
    model: nn.Module, name: str, args: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Describe exported weights, as JSON holds it.

    Args:
        model: The encoder; where `load_encoder` made it, its report knows the origin.
        name, args: What `create_encoder` builds it again with.
        tensors: What is written, by name.

    Returns:
        encoder: {"name", "args"}.
        images: How images are prepared, see `images_of`.
        origin: Where the weights come from, as far as is known. "file": the name of the checkpoint. "entry": which of
            its entries. "weights": "ema" or "raw". "objective", "epoch" (counted from 0) and "step" of the training
            and "data", a summary of what it saw; "classes", the names of those that its head tells, by label.
        sha256: See `tensors_sha256`.
        versions: Those of ssmpretrain and torch that wrote it.
    """
    report = getattr(model, "load_report", None)
    return {
        "encoder": {"name": name, "args": args},
        "images": images_of(model),
        "origin": {} if report is None else dict(report.origin),
        "sha256": tensors_sha256(tensors),
        "versions": {"ssmpretrain": ssmpretrain.__version__, "torch": str(torch.__version__)},
    }


def summary(origin: Mapping[str, Any]) -> str:
    """Return the objective, epoch, step and kind of weights of an origin, as far as they are known; else ""."""
    parts = [str(origin["objective"])] if "objective" in origin else []
    parts += [f"{key} {origin[key]}" for key in ("epoch", "step") if key in origin]
    if "weights" in origin:
        parts.append("averaged weights" if origin["weights"] == "ema" else "unaveraged weights")
    return ", ".join(parts)
