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
    "open_clip": "",  # the folder holds both towers, see objectives/contrastive/open_clip_export.py
}  # fmt: skip
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".pt2", ".onnx", ".ckpt", ".bin")


def new_path(path: str | Path, format: str) -> Path:
    """Return the path of a new export, with "~" expanded.

    Args:
        path: Path that the caller passed.
        format: Name of the format.

    Raises:
        ValueError: If the path already exists, or if its suffix does not belong to the format.
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
    """Return the path of the JSON file that describes a safetensors file. It lies in the same folder."""
    return path.with_suffix(".json")


def write(
    path: Path,
    format: str,
    model: nn.Module,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    img_size: int | tuple[int, int] | None,
) -> float | None:
    """Write an encoder to a new file or folder. If an error occurs, nothing is left at the path.

    Args:
        path: Path of the file or folder.
        format: One of `FORMATS`.
        model: The encoder.
        tensors: Tensors of the encoder, see `detached`, with the names and shapes of the format.
        about: Description of the weights, see `describe_weights`.
        img_size: Image size of a graph in pixels; None for the image size of the encoder.

    Returns:
        For "torch_export" and "onnx", the result of `largest_difference`; for the other formats None.

    Raises:
        ValueError: If the export cannot be written, or if a graph and the encoder give different outputs.
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
    """Write tensors to a safetensors file, with their description, see `describe_weights`, in its header."""
    header = {"format": "pt", DESCRIPTION: json.dumps(about)}
    path.write_bytes(safetensors.torch.save(tensors, header))  # files of save_file can be read by their owner only


def _write_official(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save({"model": tensors, DESCRIPTION: about}, content)
    path.write_bytes(content.getbuffer())  # if torch writes the file, its error for a full disk is not clear


def _write_timm(folder: Path, model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    folder.mkdir()
    config = folder / "config.json"
    save_config_for_hf(model, str(config), data_config=_preprocessing(model))
    said = json.loads(config.read_text())
    said.get("model_args", {}).pop(
        "num_classes", None
    )  # the config already has it at the top level, and transformers passes it itself
    config.write_text(json.dumps({**said, DESCRIPTION: about}, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", tensors, about)


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """Return the entry with the image size if it differs from the default of the encoder's name; else None."""
    size = get_model_input_config(model)["input_size"]
    return None if tuple(size) == tuple(model.pretrained_cfg["input_size"]) else {"input_size": size}  # type: ignore[index]


@contextmanager
def whole_export(path: Path) -> Iterator[Path]:
    """Yield a temporary path for an export, and move the export to `path` at the end, as `moved_into_place` does.

    The parent folder is created.

    Raises:
        UserError: If the export cannot be written.
        OSError: If the parent folder cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with moved_into_place(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"save_encoder: {path} could not be written: {error.strerror}. "
            f"Check the free space and the permissions of {path.parent}."
        ) from error


def how_to_read(path: Path, format: str, model: nn.Module, official_flag: str) -> tuple[str, str]:
    """Return a line of Python that reads an export, and a note about it; the note may be empty."""
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
