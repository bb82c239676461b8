"""State dict of the encoder in a checkpoint: its entry, names, checksum and origin."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

# Prefixes that wrappers put before the names of the encoder: DataParallel, our objectives, code for dense tasks,
# modules with an attribute `model`, transformers, open_clip.
_WRAPPERS = ("module.", "encoder.", "backbone.", "model.", "timm_model.", "visual.trunk.")
# Entries with weights. The first tuple holds the entries with averaged weights, of DeiT and of timm.
_AVERAGES = ("model_ema", "state_dict_ema")
_ENTRIES = ("model", "state_dict", *_AVERAGES)
# Entries of DINO, iBOT and the code based on them, with encoder ("backbone.") and head each.
_ROLES = ("teacher", "student")
# Prefix of a teacher's encoder in a state dict that holds the student too: of our objectives, and of DINOv2.
_OUR_TEACHER, _TEACHER_OF_DINOV2 = "teacher.encoder.", "teacher.backbone."
# Kind of weights of each entry. "state_dict" can be both, see `weights_kind`.
_KINDS = {
    "teacher": "teacher", "student": "student", "model": "raw", "current_model_state": "raw", "model_ema": "ema",
    "state_dict_ema": "ema",
}  # fmt: skip
_MAX_LISTED = 5
_MOST_BLOCKS = 1000  # the highest number of a block that is accepted if a file has lost blocks


@dataclass(frozen=True)
class CheckpointFile:
    """Content of a checkpoint: the weights of an encoder and their metadata.

    Attributes:
        path: Path of the file, or of the folder of its parts.
        state: Tensors of the encoder, without prefixes of wrappers.
        source: Name of the entry that was read, such as "model" or "model_ema".
        name: Registered name of the encoder; None if the file does not contain it.
        args: Arguments of the encoder; empty if the file does not contain them.
        images: Image preprocessing in the file, not checked yet, see `checked_images`; None if the file has none.
        others: Other modules in the file of another program, with their numbers of tensors, as text.
        choice: As `note` of `Chosen`.
        origin: Training that the weights come from, see `describe_weights`.
        verified: Whether the file contains a sha256 of its tensors, which was compared with the tensors.
    """

    path: Path
    state: dict[str, Tensor]
    source: str
    name: str | None
    args: dict[str, Any]
    images: Any = None
    others: str = ""
    choice: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    verified: bool = False


class Chosen(NamedTuple):
    """State dict of a checkpoint that holds one encoder.

    Attributes:
        state: The state dict.
        entry: Name of its entry. In a file with a teacher it is "teacher" or "student", or "teacher in state_dict",
            say, if one state dict holds both.
        note: Note for the report if the teacher was taken by default; else empty.
    """

    state: dict[str, Any]
    entry: str
    note: str = ""


def choose_encoder(content: dict[str, Any], path: Path, ema: bool | None, teacher: bool | None) -> Chosen:
    """Return the state dict of a checkpoint that holds the encoder: of the teacher, unless `teacher` is False.

    Args:
        content: Content of the file.
        path: Path of the file, used in error messages.
        ema, teacher: As in `load_encoder`.

    Raises:
        ValueError: If the file does not have the weights that `ema` and `teacher` select.
    """
    roles = {role: content[role] for role in _ROLES if _is_state(content.get(role))}
    inside = ""
    if not roles or (teacher is None and any(_is_state(content.get(entry)) for entry in _ENTRIES)):
        state, entry = choose_state(content, path, ema)
        roles, inside = _split(state, content), f" in {entry}"
        if not roles:
            if teacher:
                raise UserError(f"checkpoint: {path} holds no teacher beside its weights. Leave `teacher` out.")
            return Chosen(state, entry)
    elif ema:
        raise UserError(
            f"checkpoint: {path} has no averaged weights, only {' and '.join(roles)}; the teacher is an average "
            "itself. Leave `ema` out."
        )
    role = "student" if teacher is False else "teacher"
    if role not in roles:
        raise UserError(f"checkpoint: {path} has no {role}, only {', '.join(roles)}. Leave `teacher` out.")
    by_default = teacher is None and "student" in roles
    return Chosen(roles[role], role + inside, "teacher=False or --no-teacher takes the student" if by_default else "")


def _split(state: dict[str, Any], content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the tensors of teacher and student in a state dict; an empty dictionary if it has no teacher.

    Another network that an objective calls its teacher, as in distillation, does not count. A run says which it is.
    """
    named = {str(name): tensor for name, tensor in state.items()}
    prefix = _OUR_TEACHER if content.get("reported") == "teacher" else _TEACHER_OF_DINOV2
    if not any(name.startswith(prefix) for name in named):
        return {}
    theirs = {name.removeprefix("teacher."): one for name, one in named.items() if name.startswith("teacher.")}
    own = {name.removeprefix("student."): one for name, one in named.items() if not name.startswith("teacher.")}
    return {"teacher": theirs, "student": own}


def choose_state(content: dict[str, Any], path: Path, ema: bool | None) -> tuple[dict[str, Any], str]:
    """Return a state dict of a checkpoint, and the name of its entry.

    Lightning's callback for weight averaging saves the averaged weights as "state_dict" and the trained weights as
    "current_model_state".

    Args:
        content: Content of the file.
        path: Path of the file, used in error messages.
        ema: As in `load_encoder`.

    Raises:
        ValueError: If the file does not have the weights that `ema` selects.
    """
    averaged_run = _is_state(content.get("current_model_state"))
    trained = ["current_model_state"] if averaged_run else ["model", "state_dict"]
    averaged = [*_AVERAGES, "state_dict"] if averaged_run else [*_AVERAGES]
    wanted = {True: averaged, False: trained, None: _ENTRIES}[ema]
    for entry in wanted:
        if _is_state(content.get(entry)):
            return content[entry], entry
    if _is_state(content) and not ema:
        return content, "the file itself"
    present = [entry for entry in (*_ENTRIES, "current_model_state") if _is_state(content.get(entry))]
    if present:
        kind = "averaged" if ema else "unaveraged"
        raise UserError(f"checkpoint: {path} has no {kind} weights, only {', '.join(present)}. Leave `ema` out.")
    if ema and _is_state(content):
        raise UserError(f"checkpoint: {path} has one set of weights and no average. Leave `ema` out.")
    keys = ", ".join(str(key) for key in list(content)[:_MAX_LISTED]) or "nothing"
    raise UserError(f"checkpoint: {path} holds no weights under {', '.join(_ENTRIES)}; it holds {keys}.")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def own_names(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of the encoder, without prefixes of wrappers and without other modules (decoder, probe).

    Args:
        state: The state dict.
        path: Path of the file, used in error messages.

    Raises:
        ValueError: If a name contains a number of a block that is too high for the file.
    """
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}
    while True:
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    most = max(len(tensors), _MOST_BLOCKS)
    for name in tensors:
        if any(part.isdecimal() and (len(part) > 9 or int(part) >= most) for part in name.split(".")):
            raise UserError(
                f"checkpoint: blocks are numbered from 0 on; {path} names {name[:100]!r} among {len(tensors):,} "
                "tensors. The file is damaged or malicious. Download it again from a source that you trust."
            )
    return tensors


def other_modules(state: Mapping[str, Any]) -> str:
    """Return the names of the modules beside an encoder that has a prefix, with their numbers of tensors, as text.

    Args:
        state: The state dict of a file.
    """
    names = [str(key).removeprefix("module.") for key, value in state.items() if isinstance(value, Tensor)]
    if not any(name.startswith(_WRAPPERS) for name in names):
        return ""
    modules = Counter(name.split(".")[0] for name in names if not name.startswith(_WRAPPERS))
    return ", ".join(f"{module} ({count})" for module, count in modules.items())


def encoder_metadata(metadata: Any, path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the registered name and the arguments of the encoder in a file; (None, {}) if the file has none.

    Args:
        metadata: The entry `encoder` of the file. An entry of another format is ignored.
        path: Path of the file, used in error messages.

    Raises:
        ValueError: If the arguments are no dictionary with names as keys.
    """
    if not (isinstance(metadata, dict) and isinstance(metadata.get("name"), str)):
        return None, {}
    args = metadata.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        raise UserError(
            f"checkpoint: the arguments of the encoder {metadata['name']} in {path} are a dictionary by name; got "
            f"{args!r:.80}. Export the file again, or download it again."
        )
    return metadata["name"], dict(args or {})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors, in hexadecimal.

    The tensors are hashed in the order of their names (by code point). For each tensor the hash gets: the name, a zero
    byte, the dtype in PyTorch's spelling ("float32"), a zero byte, the shape as decimals separated by commas
    ("192,3,16,16"; empty for a scalar), a zero byte, and the values in row-major order, little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_sha256(state: Mapping[str, Any], said: Any, path: Path) -> bool:
    """Check the sha256 of tensors and return True; return False if the file contains no sha256.

    Args:
        state: Tensors by name.
        said: The sha256 in the file, in hexadecimal.
        path: Path of the file, used in error messages.

    Raises:
        ValueError: If the tensors have another sha256.
    """
    if not isinstance(said, str):
        return False
    found = tensors_sha256({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)})
    if found != said:
        raise UserError(
            f"checkpoint: the tensors in {path} are not those that were written: their sha256 is {found[:12]}..., the "
            f"file says {said[:12]}.... Export it again, or fetch it again from its source."
        )
    return True


def origin_in(content: Mapping[str, Any], entry: str, path: Path) -> dict[str, Any]:
    """Return the origin of weights, see `describe_weights`, from the entries of a checkpoint.

    Args:
        content: Content of the file.
        entry: Name of the entry that was read.
        path: Path of the file.
    """
    origin: dict[str, Any] = {"file": path.name, "entry": entry}
    if (kind := weights_kind(content, entry)) is not None:
        origin["weights"] = kind
    ours = {"objective": "objective", "epoch": "epoch", "global_step": "step", "data": "data", "classes": "classes"}
    ours |= {"pooled": "pooled"}
    kinds = {"objective": str, "epoch": int, "global_step": int, "data": dict, "classes": list, "pooled": dict}
    for key, meaning in ours.items():
        if isinstance(content.get(key), kinds[key]):
            origin[meaning] = _plain(content[key])
    return origin


def weights_kind(content: Mapping[str, Any], entry: str) -> str | None:
    """Return the kind of weights of an entry, None if unknown.

    The kinds are "ema" for averaged weights, "raw" for trained ones, and in a file with a teacher "teacher" and
    "student".
    """
    entry = entry.split(" in ")[0]
    if entry == "state_dict":
        return "ema" if "current_model_state" in content else "raw"
    return _KINDS.get(entry)


def _plain(value: Any) -> Any:
    """Return a value as JSON values: numbers, texts, lists and dictionaries stay, any other value becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
