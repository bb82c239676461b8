"""Which encoder a checkpoint holds: what the file says, or what its tensors tell of Vim, VMamba and ARM."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.arm import checkpoint as recognise_arm
from ssmpretrain.encoders.arm.arm import PYRAMIDS as ARM_PYRAMIDS
from ssmpretrain.encoders.arm.arm import VARIANTS as ARM_VARIANTS
from ssmpretrain.encoders.sequence.pos_embed import square_side
from ssmpretrain.encoders.vim.checkpoint import (
    class_row_in_place,
    describe,
    recognise_vim,
    refuse_relatives,
    variant_name,
)
from ssmpretrain.encoders.vim.vim import MIXER, VARIANTS
from ssmpretrain.encoders.vim.vim import PYRAMIDS as VIM_PYRAMIDS
from ssmpretrain.encoders.vmamba.checkpoint import (
    current_names,
    describe_vmamba,
    looks_like_vmamba,
    recognise_vmamba,
    vmamba_variant_name,
)
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS as VMAMBA_VARIANTS
from ssmpretrain.encoders.weights.reading import CheckpointFile

_MAX_LISTED = 5
# What to do for want of smaller patches.
FINER_GRID = "for more tokens of the same patches a larger img_size or, of a Vim, a smaller stride"
# Names that differ in what `features_only` gives, and those of the same encoders without that.
_PYRAMIDS = {**ARM_PYRAMIDS, **VIM_PYRAMIDS}
# Arguments with which timm fetches other weights; a run may have begun with them.
OTHER_WEIGHTS = ("pretrained", "checkpoint_path")


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


def name_and_args(
    file: CheckpointFile, name: str | None, encoder_args: dict[str, Any]
) -> tuple[CheckpointFile, str, dict[str, Any]]:
    """The name and arguments of the encoder in a file, and the file with its tensors under current names.

    Args:
        file: The file.
        name: The encoder's name if the caller knows it.
        encoder_args: What the caller wants of it.

    Raises:
        ValueError: If the encoder is not recognised, or what is asked for contradicts the file.
    """
    if name in _PYRAMIDS:
        file, _, args = name_and_args(file, _PYRAMIDS[name], encoder_args)
        return file, name, args
    if file.name is not None and (name in (None, file.name) or _are_one_size(name, file.name)):
        built_with = {key: value for key, value in file.args.items() if key not in OTHER_WEIGHTS}
        if name not in (None, file.name):
            built_with.pop("stride", None)  # that of the name is asked for, and the file's mixer
            built_with = {key: VARIANTS[file.name][key] for key in MIXER if key in VARIANTS[file.name]} | built_with
        return file, name or file.name, {**built_with, **encoder_args}
    if name in VMAMBA_VARIANTS or (name is None and looks_like_vmamba(file.state)):
        file = replace(file, state=current_names(file.state))
        return file, *_arguments_from_tensors(file, _VMAMBA, name, encoder_args)
    if name in ARM_VARIANTS or (name is None and recognise_arm.looks_like_arm(file.state)):
        file = replace(file, state=recognise_arm.current_names(file.state))
        return file, *_arguments_from_tensors(file, _ARM, name, encoder_args)
    if name is None or name in VARIANTS:
        refuse_relatives(file.state, file.path.name, encoder_args.get("class_token"))
        if encoder_args.get("class_token", "middle") == "middle":
            file = replace(file, state=class_row_in_place(file.state))
        return file, *_arguments_from_tensors(file, _VIM, name, encoder_args)
    return file, name, dict(encoder_args)


def _are_one_size(name: str | None, other: str) -> bool:
    """Whether a name means a file's Vim by the file's name, but perhaps for the stride; or for the mixer, if the name
    says nothing of that."""
    if name not in VARIANTS or other not in VARIANTS:
        return False
    said = {"embed_dim", "depth", *(VARIANTS[name].keys() & MIXER)}
    return all(VARIANTS[name].get(key) == VARIANTS[other].get(key) for key in said)


def _arguments_from_tensors(
    file: CheckpointFile, family: _Family, name: str | None, encoder_args: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name, if it is not given, and arguments of the encoder in a file; refuses what contradicts the file."""
    found = family.recognise(file.state)
    if found is None:
        if name is not None:
            return name, dict(encoder_args)  # filling it will list what the file lacks
        some = ", ".join(list(file.state)[:_MAX_LISTED])
        raise UserError(
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
            raise UserError(
                f"load_encoder: {file.path} has {rows} position rows, which is no square of patches. "
                "Pass img_size=(height, width) as it was trained."
            )
        return {}
    stride = asked.get("stride", found["patch_size"] if named else found["stride"])
    pixels = (side - 1) * stride + found["patch_size"]
    resizes = "stride" in asked and "img_size" in asked  # both said: its positions are resized to what they give
    if stride != found["stride"] and not resizes and asked.get("img_size") not in (pixels, (pixels, pixels)):
        raise UserError(
            f"load_encoder: {file.path} has positions for {side} x {side} patches and looks like {describe(found)}; "
            f"stride {stride} was asked for. Leave `name` and `stride` out; or pass img_size={pixels} if it was "
            f"trained with that; or stride={stride} and img_size={found['img_size']} to have its positions resized."
        )
    return {"stride": stride, "img_size": pixels}


def _refuse_cut_off(file: CheckpointFile, family: _Family, found: dict[str, Any]) -> None:
    """A registered width at an unknown depth is more likely a file that lost its last blocks than a size of its own."""
    same_but_depth = [
        name
        for name, variant in family.variants.items()
        if all(found.get(key, value) == value for key, value in variant.items() if key not in (family.depth, "stride"))
    ]
    depth = found[family.depth]
    if same_but_depth and depth not in [family.variants[name][family.depth] for name in same_but_depth]:
        whole = family.variants[same_but_depth[0]][family.depth]
        raise UserError(
            f"load_encoder: {file.path} holds {depth} blocks of {found['embed_dim']} channels; "
            f"{same_but_depth[0]} has {whole}. If blocks were left out on purpose, pass {family.depth}={depth}."
        )


def _refuse_contradictions(
    file: CheckpointFile, family: _Family, found: dict[str, Any], asked: dict[str, Any], base: str
) -> None:
    for key, value in found.items():
        if key in ("stride", "img_size", "in_chans") or key not in asked or _plain(asked[key]) == value:
            continue
        if {_plain(asked[key]), value} <= family.untraceable.get(key, set()):
            continue
        name = family.variant_name(found)
        remedy = f"Pass name={name!r} or leave `name` out" if name and name != base else f"Pass {key}={value!r}"
        remedy += f", or {FINER_GRID}" if key == "patch_size" else ""
        raise UserError(
            f"load_encoder: {file.path} holds {family.describe(found)} with {key}={value!r}; "
            f"{base} with {key}={asked[key]!r} was asked for. {remedy}."
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
