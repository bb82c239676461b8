"""Registered name and arguments of an encoder, with which `create_encoder` builds it again."""

import json
from typing import Any

import torch
from timm.models import get_model_args
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.registry import create_encoder


def encoder_name(model: nn.Module) -> str:
    """Return the registered name of an encoder.

    Raises:
        ValueError: If the encoder has no registered name.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name:
        raise UserError(
            "save_encoder: an encoder has a registered name, which the file stores; "
            f"got a {type(model).__name__} without one. Build it with create_encoder and load the weights into it."
        )
    return str(name)


def plain_args(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the arguments that build an encoder again, as JSON values.

    Args:
        model: The encoder.
        name: Its registered name.

    Raises:
        ValueError: If JSON cannot hold an argument, or if an encoder with these arguments has tensors of other names or
            shapes.
    """
    args = get_model_args(model)
    for key, value in args.items():
        if not _is_plain(value):
            raise UserError(
                f"save_encoder: the arguments of {name} are JSON values, because the file stores them; got "
                f"{key}={value!r}. Build the encoder without this argument."
            )
    plain: dict[str, Any] = json.loads(json.dumps(args))
    with torch.device("meta"):
        rebuilt = create_encoder(name, **plain)
    own, other = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, rebuilt))
    if differing := sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key)):
        raise UserError(
            f"save_encoder: {name} was changed after it was built with {plain}: "
            f"{len(differing)} of its tensors differ, {differing[0]} first. "
            "Build an encoder with its present arguments and load the weights into it."
        )
    return plain


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def detached(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's tensors by name, contiguous and on the CPU. No two copies share memory."""
    contiguous = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=contiguous) for key, value in model.state_dict().items()}
