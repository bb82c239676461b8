"""Encoders written to files that others read: safetensors, timm, the official code of Vim and VMamba, torch.export and
ONNX."""

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors.torch
import torch
from timm.models import get_model_args, get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.registry import create_encoder
from ssmpretrain.encoders.vim.blocks import VimMixer
from ssmpretrain.encoders.vim.vim import Vim
from ssmpretrain.encoders.vmamba.vmamba import VMamba
from ssmpretrain.encoders.weights.finite import check_finite
from ssmpretrain.encoders.weights.graphs import TOLERANCE, largest_difference, traceable, write_onnx, write_program
from ssmpretrain.encoders.weights.provenance import DESCRIPTION, describe_weights

Format = Literal["safetensors", "timm", "official", "torch_export", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)

_SUFFIXES = {
    "safetensors": ".safetensors", "timm": "", "official": ".pth", "torch_export": ".pt2", "onnx": ".onnx",
    "open_clip": "",  # with both towers, see objectives/contrastive/open_clip_export.py
}  # fmt: skip
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".pt2", ".onnx", ".ckpt", ".bin")
_GRAPHS = {"torch_export": write_program, "onnx": write_onnx}
# What to do where weights are no numbers.
NOT_WRITTEN = "Nothing was written: take weights from before the training diverged."
_OFFICIAL_SCANS = ("cross", "unidirectional", "bidirectional")  # its cascade is another, see `VMamba`


@dataclass(frozen=True)
class SaveReport:
    """What a save wrote; `str()` says it in one line.

    Attributes:
        path: The file, or the folder for timm.
        format: The format.
        encoder: The encoder's name.
        num_tensors: Number of tensors.
        num_bytes: Bytes of all of them.
        read_with: The line of Python that reads it back; for the official code, with its own `model`.
        note: What else the reader must know; empty for nothing.
        difference: Largest difference of the logits from the encoder's, as a part of their largest, for a format that
            holds what is computed; None for one that holds the tensors, which are the encoder's to the bit.
    """

    path: Path
    format: str
    encoder: str
    num_tensors: int
    num_bytes: int
    read_with: str
    note: str
    difference: float | None = None

    def __str__(self) -> str:
        saved = f"{self.encoder} to {self.path} ({self.format}): {self.num_tensors} tensors, {self.num_bytes:,} bytes"
        return saved if self.difference is None else f"{saved}; differs by {self.difference:.1e} of the largest number"


def save_encoder(
    model: nn.Module,
    path: str | Path,
    format: Format = "safetensors",
    *,
    img_size: int | tuple[int, int] | None = None,
) -> SaveReport:
    """Write an encoder to a new file or folder, from which it comes back with the same names, shapes, dtypes and bytes;
    or, as "torch_export" and "onnx", what it computes, which is run and compared before it is left there.

    Nothing is overwritten, and nothing half written is left at `path`. Dropout and stochastic depth belong to a
    training, not to the encoder, and are not written.

    Every format says what it holds: the encoder and its arguments, how images are prepared, where the weights come
    from, and their sha256 (`describe_weights`).

    Args:
        model: An encoder of `create_encoder` or `load_encoder`, on any device. With the latter's `keep_dtypes` a file
            in half precision stays one.
        path: The file or folder; folders above it are made.
        format: "safetensors": a file that `load_encoder` reads without being told what is in it; its description is in
            its header, and for people in a `.json` file beside it. "timm": a folder for
            `timm.create_model("local-dir:...", pretrained=True)`, after `import ssmpretrain` if the encoder is ours;
            `load_encoder` reads it too; the description is in its config.json. "official": a `.pth` for hustvl/Vim or
            MzeroMiko/VMamba, under the newest of the names and shapes that they have published: the oldest VMamba files
            come out renamed, and projections stored as 1 x 1 convolutions as matrices; the description is an entry
            beside their "model". "torch_export": a `.pt2` for `torch.export.load`, which needs nothing of this package,
            with the description as an extra file. "onnx": the same for ONNX, with it in the model's metadata. These two
            compute in float32 on the CPU, take any number of images of one size, and need no gradient.
        img_size: Pixels of that size, one number or (height, width); None for the encoder's own.

    Raises:
        ValueError: If there is something at `path` already or it cannot be written, its suffix is not the format's,
            the format cannot hold the encoder, `img_size` is given for a format that holds any, a package is missing,
            what was written computes something else, or a weight is NaN or infinite; the message says why.
        OSError: If the folders above it cannot be made.

    Source: the official code's readers: `vim/main.py` at hustvl/Vim dd0358a; `classification/utils/utils_ema.py` and
        `classification/models/vmamba.py` at MzeroMiko/VMamba 2ed52ea.
    """
    if format not in FORMATS:
        raise UserError(f"save_encoder: format is one of {', '.join(FORMATS)}; got {format!r}.")
    path, name = new_path(path, format), encoder_name(model)
    if format == "official" and (reason := _unofficial(model, name)):
        raise UserError(f"save_encoder: the official code cannot read {reason}. Write safetensors or timm.")
    if img_size is not None and format not in _GRAPHS:
        raise UserError(
            f"save_encoder: img_size is that of {' and '.join(_GRAPHS)}; got {img_size} for {format}. "
            "Leave it out, or give it to load_encoder."
        )
    args, tensors = plain_args(model, name), detached(model)
    check_finite("save_encoder", tensors, name, NOT_WRITTEN)
    about = describe_weights(model, name, args, tensors)
    difference = None
    with moved_into_place(path) as partial:
        if format in _GRAPHS:
            difference = _write_graph(partial, model, format, about, img_size)
        elif format == "official":
            _write_official(partial, tensors, about)
        elif format == "timm":
            _write_timm(partial, model, tensors, about)
        else:
            write_safetensors(partial, tensors, about)
            with moved_into_place(_beside(path)) as description:
                description.write_text(json.dumps(about, indent=2) + "\n")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return SaveReport(path, format, name, len(tensors), num_bytes, *_how_to_read(model, path, format), difference)


def new_path(path: str | Path, format: str) -> Path:
    """The file or folder of an export, which is not there yet and has the format's suffix.

    Raises:
        ValueError: If it is there, or is called like another format's.
    """
    path = Path(path).expanduser()
    if path.exists() or path.is_symlink():
        raise UserError(f"save_encoder: {path} exists, and nothing is overwritten. Remove it or choose another name.")
    if format == "safetensors" and (beside := _beside(path)).exists():
        raise UserError(
            f"save_encoder: {beside}, the description beside {path.name}, exists, and nothing is overwritten. "
            "Remove it or choose another name."
        )
    suffix = _SUFFIXES[format]
    stem = path.with_suffix("") if path.suffix in _FILE_SUFFIXES else path
    if path != stem.with_name(stem.name + suffix):
        kind = f"a file that ends in {suffix}" if suffix else "a folder"
        raise UserError(
            f"save_encoder: format {format} is {kind}; got {path}. "
            f"Call it {stem}{suffix}, or choose another format ({', '.join(_SUFFIXES)})."
        )
    return path


def _beside(path: Path) -> Path:
    """The description beside a safetensors file."""
    return path.with_suffix(".json")


def encoder_name(model: nn.Module) -> str:
    """The registered name of an encoder.

    Raises:
        ValueError: If it has none.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name:
        raise UserError(
            "save_encoder: an encoder has a registered name, by which a reader builds it too; "
            f"got a {type(model).__name__} without. Build it with create_encoder and load the weights into that."
        )
    return str(name)


def plain_args(model: nn.Module, name: str) -> dict[str, Any]:
    """Arguments that build the encoder again, as JSON holds them; proves that they do, but for the values."""
    args = get_model_args(model)
    for key, value in args.items():
        if not _is_plain(value):
            raise UserError(
                f"save_encoder: a file says with words and numbers how {name} is built; it was built with "
                f"{key}={value!r}. Build it without."
            )
    plain: dict[str, Any] = json.loads(json.dumps(args))
    with torch.device("meta"):
        rebuilt = create_encoder(name, **plain)
    own, other = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, rebuilt))
    if differing := sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key)):
        raise UserError(
            f"save_encoder: {name} was changed after it was built with {plain}: "
            f"{len(differing)} of its tensors differ, {differing[0]} first. "
            "Build it as it is now and load the weights into that."
        )
    return plain


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _unofficial(model: nn.Module, name: str) -> str | None:
    """What the official code of Vim or VMamba has no counterpart for in an encoder."""
    if isinstance(model, Vim):
        if cast(VimMixer, model.layers[0].mixer).layernorm is not None:
            return "a Vim with a norm of the scan, which is insitro/FastVim's"
        if model.num_classes and model.num_class_tokens and model.global_pool != "token":
            return f"a Vim with class tokens whose head reads global_pool={model.global_pool!r} instead"
        return None
    if not isinstance(model, VMamba):
        return f"{name}: it is that of Vim and VMamba alone"
    mixer: Any = model.layers[0].blocks[0].op  # type: ignore[union-attr,index]
    if mixer.scan not in _OFFICIAL_SCANS:
        return f"a VMamba with scan={mixer.scan!r}; its scans are {', '.join(_OFFICIAL_SCANS)}"
    if mixer.conv2d.kernel_size == (1, 1):
        return "a VMamba with d_conv=1, for which it makes no convolution"
    if model.num_classes and model.global_pool != "avg":
        return f"a VMamba whose head reads global_pool={model.global_pool!r}; it averages"
    return None


def detached(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's tensors, on the CPU, each with memory of its own, as the formats want them."""
    contiguous = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=contiguous) for key, value in model.state_dict().items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a file that says what it is, see `describe_weights`."""
    header = {"format": "pt", DESCRIPTION: json.dumps(about)}
    path.write_bytes(safetensors.torch.save(tensors, header))  # save_file's files are readable by their owner alone


def _write_official(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save({"model": tensors, DESCRIPTION: about}, content)
    path.write_bytes(content.getbuffer())  # written by torch itself, a full disk is a riddle


def _write_timm(folder: Path, model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    folder.mkdir()
    config = folder / "config.json"
    save_config_for_hf(model, str(config), data_config=_preprocessing(model))
    said = json.loads(config.read_text())
    said.get("model_args", {}).pop("num_classes", None)  # is said above it, and transformers' wrapper says it itself
    config.write_text(json.dumps({**said, DESCRIPTION: about}, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", tensors, about)


def _write_graph(
    path: Path, model: nn.Module, format: str, about: dict[str, Any], img_size: int | tuple[int, int] | None
) -> float:
    """Write what the encoder computes, and return how far that is from what it does itself."""
    model, images = traceable(model, img_size)
    about = {**about, "images": {**about["images"], "size": list(images[1:])}}
    run = _GRAPHS[format](path, model, images, about)
    difference = largest_difference(model, run, images)
    if not difference <= TOLERANCE:
        raise UserError(
            f"save_encoder: what was traced for {format} computes something else than {about['encoder']['name']}: it "
            f"differs by {difference:.1e} of the largest number, and {TOLERANCE:.0e} is allowed. Nothing was written; "
            "please report it, with the encoder's arguments and the versions of torch and onnx."
        )
    return difference


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """The image size, where it is not the one that the encoder's name stands for."""
    size = get_model_input_config(model)["input_size"]
    return None if tuple(size) == tuple(model.pretrained_cfg["input_size"]) else {"input_size": size}  # type: ignore[index]


@contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there at the end is renamed, and removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # where nobody can have put a link
    try:
        yield partial
        os.rename(partial, path)
    except OSError as error:
        raise UserError(
            f"save_encoder: {path} could not be written: {error.strerror}. "
            f"Look at the space and the permissions in {path.parent}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()


def _how_to_read(model: nn.Module, path: Path, format: str) -> tuple[str, str]:
    """The line that reads a file, and what to know besides."""
    if format == "safetensors":
        return f"ssmpretrain.load_encoder({str(path)!r})", ""
    if format == "timm":
        return f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)", "after `import ssmpretrain`"
    if format == "torch_export":
        return f"torch.export.load({str(path)!r}).module()", "without ssmpretrain; images (B, C, H, W) to logits"
    if format == "onnx":
        session = f"onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])"
        return session, "its input is called images"
    read = f"torch.load({str(path)!r}, map_location='cpu')['model']"
    if model.num_classes:
        return f"model.load_state_dict({read})", ""
    flag = "--finetune" if isinstance(model, Vim) else "--pretrained"
    note = f"there is no head in it, so the official model keeps an untrained one; its main.py reads it with {flag}"
    return f"model.load_state_dict({read}, strict=False)", note
