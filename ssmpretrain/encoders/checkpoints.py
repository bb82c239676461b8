"""Encoders from checkpoint files: published weights, our own runs, exported files."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import recognise_arm
from .arm import VARIANTS as ARM_VARIANTS
from .arm import ARMEncoder
from .checkpoint_file import CheckpointFile, read_checkpoint
from .pos_embed import resize_pos_embed
from .recognise import describe, recognise_vim, refuse_relatives, square_side, variant_name
from .recognise_vmamba import (
    current_names,
    describe_vmamba,
    looks_like_vmamba,
    recognise_vmamba,
    vmamba_variant_name,
)
from .registry import create_encoder
from .sequence_encoder import SequenceEncoder, to_height_width
from .vim import VARIANTS
from .vmamba import VARIANTS as VMAMBA_VARIANTS

_logger = logging.getLogger(__name__)

_MAX_LISTED = 5
# Arguments with which timm fetches other weights; a run may have begun with them.
_OTHER_WEIGHTS = ("pretrained", "checkpoint_path")


@dataclass(frozen=True)
class _Family:
    """How to tell the encoders of one architecture apart.

    Attributes:
        title: The architecture's name.
        variants: The arguments of its registered encoders.
        depth: The argument that counts the blocks.
        recognise: Arguments from a state dict, or None.
        variant_name: The registered name with these arguments, or None.
        describe: The same for messages, with sizes.
        implied: What a registered name means besides its own arguments.
        untraceable: Values of an argument that tensors cannot tell apart.
    """

    title: str
    variants: Mapping[str, Mapping[str, Any]]
    depth: str
    recognise: Callable[[Mapping[str, Tensor]], dict[str, Any] | None]
    variant_name: Callable[[Mapping[str, Any]], str | None]
    describe: Callable[[Mapping[str, Any]], str]
    implied: Mapping[str, Any] = field(default_factory=dict)
    untraceable: Mapping[str, set[str]] = field(default_factory=dict)


_VIM = _Family(
    "Vim",
    VARIANTS,
    "depth",
    recognise_vim,
    variant_name,
    describe,
    implied={"patch_size": 16},
    untraceable={"bidirectional": {"none", "sequence", "layer"}, "class_token": {"middle", "head"}},
)
_ARM = _Family(
    "ARM",
    ARM_VARIANTS,
    "depth",
    recognise_arm.recognise_arm,
    recognise_arm.arm_variant_name,
    recognise_arm.describe_arm,
    implied={"patch_size": 16},
)
_VMAMBA = _Family("VMamba", VMAMBA_VARIANTS, "depths", recognise_vmamba, vmamba_variant_name, describe_vmamba)


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `str()` is the line that was logged.

    Attributes:
        path: The file.
        source: The entry of the file that was taken, such as "model" or "model_ema".
        encoder: The encoder's name and sizes.
        loaded: Number of the encoder's tensors that the file filled.
        total: Number of the encoder's tensors.
        resized: Names of those whose values were resampled to another shape.
        fresh: Names of those left at their initial values: none, or the head's, and the class token that an ARM encoder
            pretrained in one direction lacks.
        unexpected: Names in the file that the encoder has no place for, a dropped head included.
        copied: Names of those that got a copy of the forward direction's values.
        args: Further arguments of `create_encoder` that give the same encoder with fresh weights.
    """

    path: Path
    source: str
    encoder: str
    loaded: int
    total: int
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unexpected: tuple[str, ...]
    copied: tuple[str, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.encoder} from {self.path} ({self.source}): {self.loaded} of {self.total} tensors loaded, "
            f"{f'{len(self.copied)} of them copied from the forward direction, ' if self.copied else ''}"
            f"{len(self.resized)} resized, missing {_listed(self.fresh)}, unexpected {_listed(self.unexpected)}"
        )


def load_encoder(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    *,
    ema: bool | None = None,
    keep_dtypes: bool = False,
    **encoder_args: Any,
) -> nn.Module:
    """Build the encoder that a checkpoint holds and fill it, or fail: no encoder comes back with a tensor left at
    random but for a head that was asked for, the norm of pooled features before it, and ARM's class token.

    Reads the published `.pth` files of Vim, VMamba and ARM, this package's training checkpoints and everything that
    `save_encoder` writes. Code in a file is never run.

    An ARM encoder comes back with four directions, as it is fine-tuned. Where the file holds one, as pretraining leaves
    it, the others start as copies of that and the class token starts fresh; `directions=1` gives the encoder as it was
    pretrained.

    Args:
        path: The file; or the folder of a run, for its last checkpoint, or one that `save_encoder` wrote for timm.
        name: The encoder's registered name; None recognises it from what the file says or from the tensors' shapes.
        num_classes: None keeps the head that the file has, so that the encoder gives logits; without one it gives
            pooled features. 0 drops the head. A number loads the file's head if that has as many classes and makes a
            fresh one if not.
        ema: True takes the moving average of the weights, False the weights that were trained, None what the file
            calls its model.
        keep_dtypes: Keep the file's dtypes where they are others than the encoder's float32: to write the tensors on
            as they are, not to compute with them.
        encoder_args: Further arguments of the encoder, such as `img_size` (the position embedding is resized to it), or
            `class_token="head"`, `bidirectional="layer"` and `scan="cascade"`, which leave no trace in the tensors.

    Returns:
        The encoder, in training mode, with a `LoadReport` as its `load_report`.

    Raises:
        ValueError: If the file cannot be read, holds another encoder than asked for, or leaves part of the encoder
            unfilled.
    """
    file = read_checkpoint(path, ema)
    if file.name is not None and name in (None, file.name):
        built_with = {key: value for key, value in file.args.items() if key not in _OTHER_WEIGHTS}
        name, args = file.name, {**built_with, **encoder_args}
    elif name in VMAMBA_VARIANTS or (name is None and looks_like_vmamba(file.state)):
        file = replace(file, state=current_names(file.state))
        name, args = _arguments_from_tensors(file, _VMAMBA, name, encoder_args)
    elif name in ARM_VARIANTS or (name is None and recognise_arm.looks_like_arm(file.state)):
        file = replace(file, state=recognise_arm.current_names(file.state))
        name, args = _arguments_from_tensors(file, _ARM, name, encoder_args)
    elif name is None or name in VARIANTS:
        refuse_relatives(file.state, file.path.name)
        name, args = _arguments_from_tensors(file, _VIM, name, encoder_args)
    else:
        args = dict(encoder_args)
    classifier = file.state.get(f"{_classifier(name)}.weight")
    classes_in_file = 0 if classifier is None else classifier.shape[0]
    args["num_classes"] = classes_in_file if num_classes is None else num_classes
    model = create_encoder(name, **args)
    other_head: set[str] = set()
    if args["num_classes"] != classes_in_file:
        other_head = _head_names(model, name, args) | _pooled_norm(model, file)
    report = replace(_fill(model, file, name, other_head, keep_dtypes), args=args)
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model


def _arguments_from_tensors(
    file: CheckpointFile, family: _Family, name: str | None, encoder_args: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name, if it is not given, and arguments of the encoder in a file; refuses what contradicts the file."""
    found = family.recognise(file.state)
    if found is None:
        if name is not None:
            return name, dict(encoder_args)  # filling it will list what the file lacks
        some = ", ".join(list(file.state)[:_MAX_LISTED])
        raise ValueError(
            f"load_encoder: {file.path} is no {family.title} checkpoint, or too little of one to recognise; "
            f"its {len(file.state)} tensors start with {some}. Pass `name` to see what it lacks."
        )
    if name is None and family.depth not in encoder_args:
        _refuse_cut_off(file, family, found)
    base = name or family.variant_name(found) or next(iter(family.variants))
    asked = {**family.variants[name], **family.implied, **encoder_args} if name is not None else encoder_args
    _refuse_contradictions(file, family, found, asked, base)
    layout = _layout(file, found, asked, named=name is not None) if family is _VIM else {}
    return base, {**found, **layout, **encoder_args}


def _layout(file: CheckpointFile, found: dict[str, Any], asked: dict[str, Any], named: bool) -> dict[str, Any]:
    """Stride and image size of a Vim file's position embedding, given the stride asked for."""
    if "pos_embed" not in file.state:
        return {}  # filling will report it
    side = square_side(file.state["pos_embed"], found["class_token"])
    if side is None:
        if "img_size" not in asked:
            rows = file.state["pos_embed"].shape[1]
            raise ValueError(
                f"load_encoder: {file.path} has {rows} position rows, which is no square of patches. "
                "Pass img_size=(height, width) as it was trained."
            )
        return {}
    stride = asked.get("stride", found["patch_size"] if named else found["stride"])
    pixels = (side - 1) * stride + found["patch_size"]
    if stride != found["stride"] and asked.get("img_size") not in (pixels, (pixels, pixels)):
        raise ValueError(
            f"load_encoder: {file.path} has positions for {side} x {side} patches and looks like {describe(found)}; "
            f"stride {stride} was asked for. Leave `name` and `stride` out, or pass img_size={pixels}."
        )
    return {"stride": stride, "img_size": pixels}


def _refuse_cut_off(file: CheckpointFile, family: _Family, found: dict[str, Any]) -> None:
    """A registered width at an unknown depth is more likely a file that lost its last blocks than a size of its own."""
    same_but_depth = [
        name
        for name, variant in family.variants.items()
        if all(found[key] == value for key, value in variant.items() if key not in (family.depth, "stride"))
    ]
    depth = found[family.depth]
    if same_but_depth and depth not in [family.variants[name][family.depth] for name in same_but_depth]:
        whole = family.variants[same_but_depth[0]][family.depth]
        raise ValueError(
            f"load_encoder: {file.path} holds {depth} blocks of {found['embed_dim']} channels; "
            f"{same_but_depth[0]} has {whole}. If blocks were left out on purpose, pass {family.depth}={depth}."
        )


def _refuse_contradictions(
    file: CheckpointFile, family: _Family, found: dict[str, Any], asked: dict[str, Any], base: str
) -> None:
    for key, value in found.items():
        if key in ("stride", "img_size") or key not in asked or _plain(asked[key]) == value:
            continue
        if {_plain(asked[key]), value} <= family.untraceable.get(key, set()):
            continue
        name = family.variant_name(found)
        remedy = f"Pass name={name!r} or leave `name` out" if name and name != base else f"Pass {key}={value!r}"
        raise ValueError(
            f"load_encoder: {file.path} holds {family.describe(found)} with {key}={value!r}; "
            f"{base} with {key}={asked[key]!r} was asked for. {remedy}."
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fill(model: nn.Module, file: CheckpointFile, name: str, other_head: set[str], keep_dtypes: bool) -> LoadReport:
    """Copy the file's tensors into the model; refuses unless all but `other_head` is filled and nothing left over."""
    own = model.state_dict()
    state, resized, copied = _fitted_state(model, file)
    usable = {key: tensor for key, tensor in state.items() if key in own and key not in other_head}

    may_lack = other_head | {"cls_token"} if copied else other_head  # one direction has no class token
    missing = [key for key in own if key not in usable and key not in may_lack]
    misfits = [
        f"{key} is {_kind(tensor)} in the file and {_kind(own[key])} in the encoder"
        for key, tensor in usable.items()
        if _kind(tensor) != _kind(own[key])
    ]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in state if key not in usable]
    left_over = [key for key in unexpected if key.split(".")[0] in parts and key not in other_head]
    problems = {"missing": missing, "of another kind": misfits, "left over": left_over}
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"load_encoder: {file.path} does not fill {name}; of {len(own)} tensors {listed}. "
            "Check that the file is whole and that `name` and the encoder's arguments are those it was trained with."
        )
    model.load_state_dict(usable, strict=False, assign=keep_dtypes)
    fresh = tuple(key for key in own if key not in usable)
    return LoadReport(file.path, file.source, name, len(usable), len(own), resized, fresh, tuple(unexpected), copied)


def _fitted_state(model: nn.Module, file: CheckpointFile) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The file's tensors as the model takes them; the names of those resized for that, and of those copied."""
    state = dict(file.state)
    resized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    if isinstance(model, ARMEncoder) and model.directions == 4 and recognise_arm.has_one_direction(state):
        state, copied = recognise_arm.four_directions(state)
    if isinstance(model, SequenceEncoder) and "pos_embed" in state:
        table = _fitted_pos_embed(model, state["pos_embed"], file)
        if table is not state["pos_embed"]:
            state["pos_embed"], resized = table, ("pos_embed",)
    return state, resized, copied


def _fitted_pos_embed(model: SequenceEncoder, table: Tensor, file: CheckpointFile) -> Tensor:
    """A position embedding for the model's grid; the same tensor where the grids agree or cannot be told."""
    wanted = model.patch_embed.grid_size
    trained_size = file.args.get("img_size", 224) if file.name is not None else None
    side = square_side(table, model.class_token)
    grid = (side, side) if side is not None else wanted
    if trained_size is not None:
        grid = model.patch_embed.dynamic_feat_size(to_height_width(trained_size))
    if math.prod(grid) + model.num_class_tokens != table.shape[1]:
        return table  # its shape will be reported as wrong
    same_rows = math.prod(grid) == math.prod(wanted)
    if grid == wanted or (same_rows and trained_size is None):
        return table
    return resize_pos_embed(table, grid, wanted, model.class_token)


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, and its dtype if it holds no fractions."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _classifier(name: str) -> str:
    """Name of the layer that gives the logits, the first where there are two."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    found = "head" if config is None else config.classifier
    return found[0] if isinstance(found, tuple) else found or "head"


def _head_names(model: nn.Module, name: str, args: dict[str, Any]) -> set[str]:
    """Names of the tensors that the encoder has with classes and lacks without, or the other way round."""
    with torch.device("meta"):
        counterpart = create_encoder(name, **{**args, "num_classes": 0 if args["num_classes"] else 1})
    return model.state_dict().keys() ^ counterpart.state_dict().keys()


def _pooled_norm(model: nn.Module, file: CheckpointFile) -> set[str]:
    """timm's norm of what is pooled, if the file's encoder pooled nothing: it begins with the head, as MAE's does."""
    return {name for name in model.state_dict() if name.startswith("fc_norm.") and name not in file.state}


def _listed(keys: Sequence[str]) -> str:
    """A handful of names and how many more there are; "none" for none."""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more if keys else "none"
