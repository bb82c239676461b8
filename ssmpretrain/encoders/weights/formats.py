"""File formats of exported encoders: safetensors, timm's folder, the official code's `.pth`, torch.export and ONNX."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import moved_into_place, replace_json
from ssmpretrain.encoders.weights.graphs import write_graph
from ssmpretrain.encoders.weights.provenance import DESCRIPTION

Format = Literal["safetensors", "timm", "official", "torch_export", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)

_SUFFIXES = {
    "safetensors": ".safetensors", "timm": "", "official": ".pth", "torch_export": ".pt2", "onnx": ".onnx",
    "open_clip": "",  # with both towers, see objectives/contrastive/open_clip_export.py
}  # fmt: skip
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".pt2", ".onnx", ".ckpt", ".bin")


def new_path(path: str | Path, format: str) -> Path:
    """Return the path of an export, if nothing is there yet and its suffix is the format's.

    Raises:
        ValueError: If something is there, or the suffix is another format's.
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
    """Return the path of the description beside a safetensors file."""
    return path.with_suffix(".json")


def write(
    path: Path,
    format: str,
    model: nn.Module,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    img_size: int | tuple[int, int] | None,
) -> float | None:
    """Write an encoder to a new file or folder; after an error nothing is left there.

    Args:
        path: The file or folder.
        format: One of `FORMATS`.
        model: The encoder.
        tensors: Its tensors, see `detached`, in the layout of the format.
        about: Its description, see `describe_weights`.
        img_size: Pixels of the images of a graph; None for the encoder's own.

    Returns:
        Largest difference of a graph's answer from the encoder's, as a part of its largest number; None for a format
        that holds the tensors themselves.

    Raises:
        ValueError: If it cannot be written, or a graph computes something else.
    """
    with whole_export(path) as partial:
        if format == "official":
            _write_official(partial, tensors, about)
        elif format == "timm":
            _write_timm(partial, model, tensors, about)
        elif format == "safetensors":
            write_safetensors(partial, tensors, about)
            replace_json(_beside(path), about, indent=2)
        else:
            return write_graph(partial, format, model, about, img_size)
    return None


def write_safetensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a safetensors file with its description, see `describe_weights`, in the header."""
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


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """Return the image size if it is not the one that the encoder's name stands for."""
    size = get_model_input_config(model)["input_size"]
    return None if tuple(size) == tuple(model.pretrained_cfg["input_size"]) else {"input_size": size}  # type: ignore[index]


@contextmanager
def whole_export(path: Path) -> Iterator[Path]:
    """Give a free name beside `path` for a file or folder, as `moved_into_place` does; the folder above is made.

    Raises:
        UserError: If the export cannot be written.
        OSError: If the folder above cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with moved_into_place(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"save_encoder: {path} could not be written: {error.strerror}. "
            f"Look at the space and the permissions in {path.parent}."
        ) from error


def how_to_read(path: Path, format: str, model: nn.Module, official_flag: str) -> tuple[str, str]:
    """Return the line of Python that reads an export, and a note for its reader."""
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
    note = "there is no head in it, so the official model keeps an untrained one; its main.py reads it with "
    note += official_flag
    return f"model.load_state_dict({read}, strict=False)", note
