"""Export encoders to files: safetensors, timm, the official code, torch.export and ONNX."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import families, family_of
from ssmpretrain.encoders.weights.arguments import detached, encoder_name, plain_args
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.formats import FORMATS, Format, how_to_read, new_path, write
from ssmpretrain.encoders.weights.graphs import GRAPHS
from ssmpretrain.encoders.weights.provenance import describe_weights

NOT_WRITTEN = "Nothing was written. Use weights from before the training diverged."


@dataclass(frozen=True)
class SaveReport:
    """Report of `save_encoder`; `str()` gives one line.

    Attributes:
        path: Path of the file, or of the folder for the format "timm".
        format: Name of the format.
        encoder: Registered name of the encoder.
        num_tensors: Number of tensors.
        num_bytes: Size of all tensors in bytes.
        read_with: Line of Python that reads the export. For the format "official", it expects a `model` of the official
            code.
        note: Further information for the reader; may be empty.
        difference: For "torch_export" and "onnx", the largest difference between the outputs of the graph and of the
            encoder, divided by the largest output. None for the other formats, which hold the exact tensors.
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
    """Export an encoder to a new file or folder.

    "safetensors" and "timm" store the tensors with the same names, shapes, dtypes and values. "official" stores them
    with the names and shapes of the official code. "torch_export" and "onnx" store a graph of the computation. The
    function runs the graph and compares it with the encoder.

    Existing files are never overwritten, and an error leaves no partial file at `path`. Dropout and stochastic depth
    are settings of a training and are not exported.

    Every format contains a description, see `describe_weights`: the encoder and its arguments, the image preprocessing,
    the origin of the weights, and their sha256.

    Args:
        model: An encoder of `create_encoder` or `load_encoder`, on any device. To keep half precision, load the encoder
            with `keep_dtypes=True`.
        path: Path of the new file or folder. Parent folders are created.
        format: "safetensors": a file for `load_encoder`, which needs no further arguments to read it. The description
            is in its header, and also in a `.json` file with the same name. "timm": a folder for
            `timm.create_model("local-dir:...", pretrained=True)` and for `load_encoder`. timm needs
            `import ssmpretrain` first if the encoder belongs to this package. The description is in `config.json`.
            "official": a `.pth` file for hustvl/Vim or MzeroMiko/VMamba, with their newest names and shapes, even if
            the weights came from an older file. The description is an entry next to "model". "torch_export": a `.pt2`
            file for `torch.export.load`, which does not need this package. The description is an extra file in it.
            "onnx": an ONNX file. The description is in its metadata. The last two compute in float32 on the CPU,
            without gradients, for any number of images of one size.
        img_size: Image size of "torch_export" and "onnx" in pixels, one number or (height, width); None for the image
            size of the encoder.

    Returns:
        A report of the export.

    Raises:
        ValueError: If `path` already exists, cannot be written or has the wrong suffix; if the format cannot hold the
            encoder; if `img_size` is given for another format than "torch_export" and "onnx"; if a package is missing;
            if a graph and the encoder give different outputs; or if a weight is NaN or infinite.
        OSError: If a parent folder cannot be created.

    Source: the official code's readers: `vim/main.py` at hustvl/Vim dd0358a; `classification/utils/utils_ema.py` and
        `classification/models/vmamba.py` at MzeroMiko/VMamba 2ed52ea.
    """
    if format not in FORMATS:
        raise UserError(f"save_encoder: format is one of {', '.join(FORMATS)}; got {format!r}.")
    path = new_path(path, format)
    if img_size is not None and format not in GRAPHS:
        raise UserError(
            f"save_encoder: img_size is an argument of {' and '.join(GRAPHS)} only; got {img_size} for {format}. "
            "Leave it out, or pass it to load_encoder."
        )
    name = encoder_name(model)
    args, tensors = plain_args(model, name), detached(model)
    family = family_of(model)
    if format == "official":
        published = ", ".join(one.title for one in reversed(families()) if one.official_code)
        alone = None if family.official_code else f"{name}: it reads only {published}"
        if reason := alone or family.not_official(model):
            raise UserError(f"save_encoder: the official code cannot read {reason}. Write safetensors or timm.")
        tensors = family.official_state(tensors)
    check_finite("save_encoder", tensors, name, NOT_WRITTEN)
    about = describe_weights(model, name, args, tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    read_with, note = how_to_read(path, format, model, family.official_flag)
    difference = write(path, format, model, tensors, about, img_size)
    return SaveReport(path, format, name, len(tensors), num_bytes, read_with, note, difference)
