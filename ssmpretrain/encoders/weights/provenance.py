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
_WEIGHTS = {
    "ema": "averaged weights",
    "raw": "unaveraged weights",
    "teacher": "weights of the teacher",
    "student": "weights of the student",
}


def describe_weights(
    model: nn.Module, name: str, args: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the description of exported weights, as JSON values.

    Args:
        model: The encoder. If `load_encoder` returned it, the origin comes from its report.
        name, args: Registered name and arguments with which `create_encoder` builds the encoder again.
        tensors: The exported tensors by name.

    Returns:
        encoder: {"name", "args"}.
        images: Image preprocessing, see `images_of`.
        origin: Origin of the weights; unknown entries are missing. "file": name of the checkpoint. "entry": name of the
            entry in the checkpoint. "weights": "ema" or "raw", or in a run with a teacher "teacher" or "student".
            "objective", "epoch" (counted from 0) and "step" of the training. "data": summary of the training data.
            "classes": names of the head's classes, by label. "pooled": kind of the pooled feature that stands for an
            image, see `Pooled`.
        sha256: Checksum of the tensors, see `tensors_sha256`.
        versions: Versions of ssmpretrain and torch that wrote the export.
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
    """Return the objective, epoch, step and kind of weights of an origin as text; unknown values are left out."""
    parts = [str(origin["objective"])] if "objective" in origin else []
    parts += [f"{key} {origin[key]}" for key in ("epoch", "step") if key in origin]
    if "weights" in origin:
        parts.append(_WEIGHTS.get(str(origin["weights"]), str(origin["weights"])))
    return ", ".join(parts)
