"""Create encoders of this package and of timm by name. Errors suggest the most similar name."""

import difflib
import inspect
import re
from fnmatch import fnmatch
from typing import Any

import timm
from timm.models import is_model
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.building import TIMMS_OWN
from ssmpretrain.encoders.family_registry import families, family_named, import_added_families
from ssmpretrain.encoders.weights.finite_check import check_finite

# Arguments of timm.create_model and build_model_with_cfg, which the encoder itself does not get.
_BUILDER_ARGUMENTS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "out_indices",
    "feature_cls",
)


def list_encoders(filter: str = "*") -> list[str]:
    """Return the sorted names of the encoders of all registered families that match a shell pattern.

    `timm.list_models` lists the other encoders of timm.

    Args:
        filter: Shell pattern, such as "vim*".
    """
    if not isinstance(filter, str):
        raise UserError(f"list_encoders: filter is a shell pattern; got {filter!r}. Give one such as 'vim*'.")
    import_added_families()
    return sorted(name for family in families() for name in family.names if fnmatch(name, filter))


def create_encoder(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    class_token: str | None = None,
    pos_embed: str | None = None,
    bidirectional: str | None = None,
    backward_dt_bias_init: str | None = None,
    layer_decay_pairs: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Build an encoder with random weights.

    The function calls `timm.create_model` and adds clearer errors and typed arguments for recipes. None means the
    default of the encoder. The class of the encoder, such as `ssmpretrain.encoders.vim.vim.Vim`, explains the arguments
    in detail. VMamba and the encoders of timm accept only some of them.

    Args:
        name: One of `list_encoders()` or of `timm.list_models()`.
        num_classes: Outputs of the head; 0 for no head.
        img_size: Size of the images in pixels, one number or (height, width).
        patch_size: Side of a patch in pixels.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        global_pool: Pooling before the head.
        class_token: Place of the class token.
        pos_embed: Kind of position embedding.
        bidirectional: How a token gets information from both sides.
        backward_dt_bias_init: Initial step sizes of the backward direction.
        layer_decay_pairs: Give pairs of blocks one learning rate under layer-wise learning rate decay.
        options: Further arguments of the encoder or of `timm.create_model`, such as `features_only`.

    Returns:
        The encoder, in training mode.

    Raises:
        ValueError: If the name or an argument does not exist (the message suggests similar ones), or if an argument is
            out of range.
    """
    if not isinstance(name, str):
        raise UserError(f"create_encoder: name is a text, such as 'vim_tiny_patch16_224'; got {name!r}. Pass a name.")
    if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, int)):
        raise UserError(f"create_encoder: num_classes is a whole number; got {num_classes!r}. Give one, 0 for no head.")
    if not is_model(name):
        import_added_families()
    if not is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        ours = f"Ours are {', '.join(list_encoders()[:16])}, ... (`list_encoders`)."
        hint = f"Did you mean {' or '.join(near)}?" if near else ours
        raise UserError(f"create_encoder: name is a registered encoder; got {name!r}. {hint}")
    named = {
        "num_classes": num_classes,
        "img_size": img_size,
        "patch_size": patch_size,
        "drop_path_rate": drop_path_rate,
        "global_pool": global_pool,
        "class_token": class_token,
        "pos_embed": pos_embed,
        "bidirectional": bidirectional,
        "backward_dt_bias_init": backward_dt_bias_init,
        "layer_decay_pairs": layer_decay_pairs,
    }
    options |= {key: value for key, value in named.items() if value is not None}
    if (accepted := _arguments(name)) is not None:
        _refuse_unknown(name, options, accepted)
    try:
        model = timm.create_model(name, **options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise UserError(
                f"create_encoder: arguments of {name} have the types in its documentation; got {options}, and "
                f"{error}. Correct them."
            ) from error
        raise UserError(f"create_encoder: {name} takes no argument {unknown[1]!r}. Remove it.") from error
    if options.get("pretrained") or options.get("checkpoint_path"):
        check_finite("create_encoder", model.state_dict(), options.get("checkpoint_path") or f"the weights of {name}")
    return model


def _arguments(name: str) -> list[str] | None:
    """Return the names of all arguments that an encoder accepts; None if they are unknown, as for timm's encoders."""
    family = family_named(name)
    if not family.classes:
        return None
    return [*inspect.signature(family.classes[0]).parameters, *_BUILDER_ARGUMENTS, *TIMMS_OWN]


def _refuse_unknown(name: str, options: dict[str, Any], accepted: list[str]) -> None:
    for option in options:
        if option not in accepted:
            near = difflib.get_close_matches(option, accepted, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(accepted)}."
            if option == "img_size":
                hint = "It takes images of any size: leave it out."
            raise UserError(f"create_encoder: {name} takes no argument {option!r}. {hint}")
