"""Names for timm that carry an encoder's arguments, for configurations that have room for a name and nothing else."""

import json
from typing import Any
from urllib.parse import parse_qsl, urlencode

from timm.models import register_model
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.registry import create_encoder


def as_timm_name(name: str, args: dict[str, Any]) -> str:
    """Return a name for `timm.create_model`, after `import ssmpretrain`, that builds an encoder with arguments.

    Args:
        name: The encoder's registered name, ours or timm's.
        args: Its further arguments, as JSON holds them.

    Returns:
        The name itself where there are no arguments, else "ssmpretrain_encoder.name=test_vim&patch_size=8", say; with
        escapes for what timm takes for a path or a source.
    """
    if not args:
        return name
    words = {key: json.dumps(value, separators=(",", ":")) for key, value in args.items()}
    return f"{ssmpretrain_encoder.__name__}.{urlencode({'name': name, **words}, safe='[,]')}"


def args_in_timm_name(name: str | None) -> dict[str, Any]:
    """Return the arguments in a name of `as_timm_name`; empty for another name."""
    words = dict(parse_qsl((name or "").partition(f"{ssmpretrain_encoder.__name__}.")[2]))
    words.pop("name", None)
    return {key: _value(key, word) for key, word in words.items()}


def _value(key: str, word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{ssmpretrain_encoder.__name__}: {key} in the name is spelled as JSON; got {word:.60}. Name it anew."
        ) from error


@register_model
def ssmpretrain_encoder(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """Build the encoder that the rest of the name says, see `as_timm_name`; further arguments come before those.

    Raises:
        ValueError: If the rest of the name says none.
    """
    words = dict(parse_qsl(pretrained_cfg)) if isinstance(pretrained_cfg, str) else {}
    name = words.pop("name", None)
    if name is None:
        raise UserError(
            f"{ssmpretrain_encoder.__name__}: the name goes on with an encoder and its arguments, such as "
            f"{as_timm_name('test_vim', {'patch_size': 8})}; got {pretrained_cfg!r}. Name the encoder itself, or say "
            "its arguments so."
        )
    given = {key: value for key, value in kwargs.items() if value is not None}
    return create_encoder(
        name, pretrained=pretrained, **{key: _value(key, word) for key, word in words.items()} | given
    )
