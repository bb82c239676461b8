"""Model names for timm that contain the arguments of an encoder.

They serve configurations that can hold a model name but no arguments.
"""

import json
from typing import Any
from urllib.parse import parse_qsl, urlencode

from timm.models import register_model
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.registry import create_encoder


def as_timm_name(name: str, args: dict[str, Any]) -> str:
    """Return a model name for `timm.create_model` that contains an encoder's name and arguments.

    The name works after `import ssmpretrain`.

    Args:
        name: Registered name of the encoder, of this package or of timm.
        args: Further arguments of the encoder, as JSON values.

    Returns:
        `name` itself if there are no arguments; otherwise, for example,
        "ssmpretrain_encoder.name=test_vim&patch_size=8". Characters with a meaning for timm are escaped.
    """
    if not args:
        return name
    words = {key: json.dumps(value, separators=(",", ":")) for key, value in args.items()}
    return f"{ssmpretrain_encoder.__name__}.{urlencode({'name': name, **words}, safe='[,]')}"


def args_in_timm_name(name: str | None) -> dict[str, Any]:
    """Return the arguments in a model name that `as_timm_name` made; empty for any other name."""
    words = dict(parse_qsl((name or "").partition(f"{ssmpretrain_encoder.__name__}.")[2]))
    words.pop("name", None)
    return {key: _value(key, word) for key, word in words.items()}


def _value(key: str, word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{ssmpretrain_encoder.__name__}: the value of {key} in the name is JSON; got {word:.60}. Correct the name."
        ) from error


@register_model
def ssmpretrain_encoder(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """Build the encoder that is written in a model name, see `as_timm_name`.

    Args:
        pretrained: As in `timm.create_model`.
        pretrained_cfg: The part of the model name after the point.
        kwargs: Further arguments of the encoder. They replace arguments in the model name.

    Raises:
        ValueError: If the model name contains no encoder.
    """
    words = dict(parse_qsl(pretrained_cfg)) if isinstance(pretrained_cfg, str) else {}
    name = words.pop("name", None)
    if name is None:
        raise UserError(
            f"{ssmpretrain_encoder.__name__}: the name contains an encoder and its arguments, such as "
            f"{as_timm_name('test_vim', {'patch_size': 8})}; got {pretrained_cfg!r}. Use the encoder's own name, or "
            "write its arguments in this form."
        )
    given = {key: value for key, value in kwargs.items() if value is not None}
    return create_encoder(
        name, pretrained=pretrained, **{key: _value(key, word) for key, word in words.items()} | given
    )
