"""A contrastive objective from the checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images, images_of, remember_images
from ssmpretrain.encoders.weights.state_dict import choose_state, origin_in
from ssmpretrain.objectives.contrastive.objective import Contrastive
from ssmpretrain.objectives.restore import built, class_in


@dataclass(frozen=True)
class ContrastiveRun:
    """Both towers of a run.

    Attributes:
        model: The objective, in evaluation mode; its encoder knows how its images are prepared.
        path: The checkpoint.
        images: How images are prepared, see `images_of`.
        origin: Where the weights come from, see `describe_weights`.
    """

    model: Contrastive
    path: Path
    images: dict[str, Any]
    origin: dict[str, Any]


def load_contrastive(path: str | Path, ema: bool | None = None) -> ContrastiveRun:
    """Build the objective that a checkpoint was saved by and fill it; what it began with need not be there any more.

    Args:
        path: The folder of a run of CLIP, or a checkpoint of it.
        ema: True for the moving average of the weights, False for the weights in training; None for what the file calls
            its model.

    Raises:
        ValueError: If the file cannot be read, lacks the weights asked for, is no checkpoint of a contrastive run, or
            a weight is NaN or infinite.
    """
    path = weights_in(path)
    content = read_content(path)
    cls = class_in(content, Contrastive)  # type: ignore[type-abstract]
    if cls is None:
        name = content.get("objective") if isinstance(content, dict) else None
        what = f"one of {name}" if name else "none of a run"
        raise ValueError(
            f"checkpoint: images and texts have embeddings in a run of CLIP; {path} is {what}. "
            "Give the folder of a run of CLIP, or its checkpoints/last.ckpt. To teach this encoder texts: fit --config "
            f"clip_vim_b --model.encoder null --model.init_from {path}; to judge its features: knn."
        )
    state, entry = choose_state(content, path, ema)
    check_finite("checkpoint", state, path)
    model = built(cls, content, state, path)
    model.load_state_dict(state)
    remember_images(model.encoder, checked_images(content.get("images"), path))
    return ContrastiveRun(model.eval(), path, images_of(model.encoder), origin_in(content, entry, path))
