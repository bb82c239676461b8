"""What joins the two towers of a contrastive objective, from the checkpoint of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import weights_in

if TYPE_CHECKING:
    from ssmpretrain.objectives.contrastive.objective import Contrastive

_log = logging.getLogger(__name__)


@torch.no_grad()
def fill_joint(model: Contrastive, path: str | Path) -> None:
    """Copy the projection of the image features and, where the loss is the same, its temperature and bias.

    Args:
        model: The objective.
        path: A run of CLIP or its checkpoint.

    Raises:
        ValueError: If it is none, its common space has another width, or a value is NaN or infinite.
    """
    file = weights_in(path)
    content = read_content(file)
    state: dict[str, Tensor] = content.get("state_dict", {}) if isinstance(content, dict) else {}
    if not {"image_projection.weight", "logit_scale"} <= state.keys():
        raise ValueError(
            f"{type(model).__name__}: init_both_towers takes all of a run of CLIP; {file} is none. "
            "Leave it out to begin with the encoder alone."
        )
    theirs, ours = (tuple(one.shape) for one in (state["image_projection.weight"], model.image_projection.weight))
    if theirs != ours:
        raise ValueError(
            f"{type(model).__name__}: the run that it begins with has embeddings of {theirs[0]} numbers; got "
            f"embed_dim {ours[0]}. Set model.embed_dim={theirs[0]}."
        )
    joint = ("image_projection.weight", "logit_scale", "logit_bias")
    check_finite(type(model).__name__, {name: state[name] for name in joint if name in state}, file)
    model.image_projection.weight.copy_(state["image_projection.weight"])
    same_loss = ("logit_bias" in state) == (model.logit_bias is not None)
    if same_loss:
        model.logit_scale.copy_(state["logit_scale"])
    if same_loss and model.logit_bias is not None:
        model.logit_bias.copy_(state["logit_bias"])
    what = "projection, temperature and bias" if same_loss else "projection (another loss has another temperature)"
    _log.info("%s from %s", what, file)
