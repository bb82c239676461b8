"""Encoders written to files that others read: safetensors, timm, official code, torch.export and ONNX."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.families import families, family_of
from ssmpretrain.encoders.weights.arguments import detached, encoder_name, plain_args
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.formats import FORMATS, Format, how_to_read, new_path, write
from ssmpretrain.encoders.weights.graphs import GRAPHS
from ssmpretrain.encoders.weights.provenance import describe_weights

NOT_WRITTEN = "Nothing was written: take weights from before the training diverged."


@dataclass(frozen=True)
class SaveReport:
    """Account of an export; `str()` says it in one line.

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
    path = new_path(path, format)
    if img_size is not None and format not in GRAPHS:
        raise UserError(
            f"save_encoder: img_size is that of {' and '.join(GRAPHS)}; got {img_size} for {format}. "
            "Leave it out, or give it to load_encoder."
        )
    name = encoder_name(model)
    args, tensors = plain_args(model, name), detached(model)
    family = family_of(model)
    if format == "official":
        published = " and ".join(one.title for one in reversed(families()) if one.official_code)
        alone = None if family.official_code else f"{name}: it is that of {published} alone"
        if reason := alone or family.not_official(model):
            raise UserError(f"save_encoder: the official code cannot read {reason}. Write safetensors or timm.")
        tensors = family.official_state(tensors)
    check_finite("save_encoder", tensors, name, NOT_WRITTEN)
    about = describe_weights(model, name, args, tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    read_with, note = how_to_read(path, format, model, family.official_flag)
    difference = write(path, format, model, tensors, about, img_size)
    return SaveReport(path, format, name, len(tensors), num_bytes, read_with, note, difference)
