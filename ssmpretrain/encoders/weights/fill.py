"""Fill an encoder with the tensors of a file, all of them or none, and report it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from timm.models import adapt_input_conv, get_model_input_config
from torch import Tensor, nn

from ssmpretrain.encoders.family import Adapted, family_named, family_of
from ssmpretrain.encoders.sequence.patch_embed import to_height_width
from ssmpretrain.encoders.weights.build import BuiltEncoder
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.match import FINER_GRID
from ssmpretrain.encoders.weights.provenance import summary
from ssmpretrain.encoders.weights.reading import CheckpointFile

_MAX_LISTED = 5


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
        origin: Where the weights come from, see `describe_weights`.
        notes: What else was done, in words: what was resized from what to what, what became of the head, whether the
            file's sha256 was verified.
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
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        training = summary(self.origin)
        counts = (
            f"{self.encoder} from {self.path} ({self.source}): {self.loaded} of {self.total} tensors loaded, "
            f"{f'{len(self.copied)} of them copied from the forward direction, ' if self.copied else ''}"
            f"{len(self.resized)} resized, missing {_listed(self.fresh)}, unexpected {_listed(self.unexpected)}"
        )
        return "; ".join([counts, *self.notes, *([training] if training else [])])


def fill(built: BuiltEncoder, file: CheckpointFile, keep_dtypes: bool, asked: Mapping[str, Any]) -> LoadReport:
    """Copy a file's tensors into an encoder, and resize one of timm's to the image size asked for.

    Args:
        built: The encoder.
        file: The file.
        keep_dtypes: As in `load_encoder`.
        asked: The arguments that the caller asked for.

    Raises:
        ValueError: If anything but `built.fresh` stays unfilled, anything of the encoder's is left over, or a value is
            no finite number.
    """
    model: Any = built.model
    own = model.state_dict()
    built_with = None if file.name is None else {**family_named(file.name).sizes(file.name), **file.args}
    family = family_of(model)
    adapted = _with_channels(family.adapt(file.state, model, built_with), model, asked)
    usable = {key: tensor for key, tensor in adapted.state.items() if key in own and key not in built.fresh}

    may_lack = built.fresh | {"cls_token"} if adapted.copied else built.fresh  # one direction has no class token
    missing = [key for key in own if key not in usable and key not in may_lack]
    misfits = [key for key, tensor in usable.items() if _kind(tensor) != _kind(own[key])]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in adapted.state if key not in usable]
    left_over = [key for key in unexpected if key.split(".")[0] in parts and key not in built.fresh]
    kinds = [f"{key} is {_kind(usable[key])} in the file and {_kind(own[key])} in the encoder" for key in misfits]
    problems = {"missing": missing, "of another kind": kinds, "left over": left_over}
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"load_encoder: {file.path} does not fill {built.name}; of {len(own)} tensors {listed}. "
            + _remedy(file, misfits, asked)
        )
    check_finite("load_encoder", usable, file.path)
    model.load_state_dict(usable, strict=False, assign=keep_dtypes)
    fresh = tuple(key for key in own if key not in usable)
    report = LoadReport(
        file.path, file.source, built.name, len(usable), len(own), adapted.resized, fresh, tuple(unexpected),
        adapted.copied, origin=file.origin, notes=adapted.notes,
    )  # fmt: skip
    if "img_size" in built.args and not family.resizes_positions and hasattr(model, "set_input_size"):
        report = _resized(model, built.args["img_size"], report)
    head = _head_note(built.args["num_classes"], built.classes_in_file)
    notes = (*report.notes, *head, *["sha256 verified"] * file.verified)
    return replace(report, args=built.args, notes=notes)


def fill_wrapper(built: BuiltEncoder, keep_dtypes: bool) -> nn.Module:
    """Copy the values of an encoder into timm's wrapper of it; a pyramid's own layers stay fresh.

    The wrapper renames modules: it puts "model." before, or "_" for ".".
    """
    assert built.wrapper is not None
    values = {key.replace("_", "."): tensor for key, tensor in built.model.state_dict().items()}
    assert len(values) == len(built.model.state_dict())
    own = built.wrapper.state_dict()
    fresh = {key: tensor for key, tensor in own.items() if key.startswith("levels.")}
    wanted = {key: values[key.removeprefix("model.").replace("_", ".")] for key in own.keys() - fresh.keys()}
    built.wrapper.load_state_dict(wanted | fresh, assign=keep_dtypes)
    return built.wrapper


def _remedy(file: CheckpointFile, misfits: list[str], asked: Mapping[str, Any]) -> str:
    """What to do about tensors that do not fill an encoder."""
    if "patch_embed.proj.weight" in misfits and (side := file.state["patch_embed.proj.weight"].shape[-1]):
        return f"Its patches have {side} x {side} pixels: pass patch_size={side} or leave it out, or {FINER_GRID}."
    other = [key for key, value in asked.items() if file.name is not None and value != file.args.get(key)]
    if other:
        built = ", ".join(f"{key}={file.args[key]!r}" if key in file.args else f"{key} unsaid" for key in other)
        return (
            f"The file says it was built with {built}: leave {', '.join(other)} out, or check that the file is whole."
        )
    return "Check that the file is whole and that `name` and the encoder's arguments are those it was trained with."


def _with_channels(fitted: Adapted, model: nn.Module, asked: Mapping[str, Any]) -> Adapted:
    """The tensors with those that read the images brought to the channels asked for, as timm does it."""
    if "in_chans" not in asked:
        return fitted
    cfg, own = cast("dict[str, Any]", model.pretrained_cfg), model.state_dict()
    first = cfg.get("first_conv") or ()
    names = [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]
    state, notes = dict(fitted.state), []
    for name in names:
        before, after = (weights[name].shape[1] if name in weights else None for weights in (state, own))
        if before is None or after is None or before == after or state[name].shape[2:] != own[name].shape[2:]:
            continue
        state[name] = adapt_input_conv(after, state[name], base_chans=before)
        notes.append(f"{name} adapted from {before} to {after} channels")
    return replace(fitted, state=state, notes=(*fitted.notes, *notes))


def _resized(model: Any, img_size: Any, report: LoadReport) -> LoadReport:
    """Bring a filled encoder of timm's to another image size, in place; return the report of it too."""
    size = to_height_width(img_size)
    if tuple(get_model_input_config(model)["input_size"][1:]) == size:
        return report
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    old = model.patch_embed.grid_size
    model.set_input_size(img_size=size)
    resized = tuple(key for key, tensor in model.state_dict().items() if tensor.shape != shapes[key])
    new = model.patch_embed.grid_size
    note = f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
    return replace(report, resized=resized, notes=(note,))


def _head_note(classes: int, classes_in_file: int) -> list[str]:
    """Return a note about a head that is not the file's."""
    if classes == classes_in_file:
        return []
    if not classes:
        return [f"head of {classes_in_file} classes left out"]
    return [
        f"fresh head of {classes} classes, the file has {f'one of {classes_in_file}' if classes_in_file else 'none'}"
    ]


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, and its dtype if it holds no fractions."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _listed(keys: Sequence[str]) -> str:
    """A handful of names and how many more there are; "none" for none."""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more if keys else "none"
