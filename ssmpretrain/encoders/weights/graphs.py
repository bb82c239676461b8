"""Export of encoders and dense models as graphs, `torch.export` programs and ONNX, which run without this package.

Each graph is run and compared with the model after it is written. It contains only operations of PyTorch: each scan
is traced on the CPU as `kernels.selective_scan.exported`.
"""

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.sequence.patch_embed import to_height_width
from ssmpretrain.encoders.weights.provenance import DESCRIPTION

# Largest allowed difference from the encoder's output, divided by its largest value: about 1000 roundings of float32.
TOLERANCE = 1e-4
# Number of images in the traced batch, and in the batches that compare graph and encoder.
_TRACED, _TRIED = 2, (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_BYTES = 2**31  # the limit of one protobuf message

Runner = Callable[[Tensor], Sequence[Tensor]]


def write_graph(
    path: Path, format: str, model: nn.Module, about: dict[str, Any], img_size: int | tuple[int, int] | None
) -> float:
    """Write the graph of an encoder and return the result of `largest_difference`.

    Args:
        path: Path of the new file.
        format: "torch_export" or "onnx".
        model: The encoder.
        about: Description of the weights, see `describe_weights`.
        img_size: Image size in pixels, one number or (height, width); None for the image size of the encoder.

    Raises:
        ValueError: If the outputs of graph and encoder differ by more than `TOLERANCE`, or a package is missing.
    """
    model, images = traceable(model, img_size)
    outputs = ["logits" if cast(Any, model).num_classes else "features"]
    return write_traced(path, format, model, images, about, outputs)


def write_traced(
    path: Path,
    format: str,
    model: nn.Module,
    images: tuple[int, int, int],
    about: dict[str, Any],
    outputs: Sequence[str],
) -> float:
    """Write the graph of a model and return the result of `largest_difference`.

    Args:
        path: Path of the new file.
        format: "torch_export" or "onnx".
        model: A model that returns one tensor or a list of tensors, on the CPU, in float32 and in evaluation mode.
        images: Shape of an image, (C, height, width).
        about: Description of the weights, see `describe_weights`.
        outputs: Names of the tensors that the model returns.

    Raises:
        ValueError: If the outputs of graph and model differ by more than `TOLERANCE`, or a package is missing.
    """
    about = {**about, "images": {**about["images"], "size": list(images[1:])}}
    run = GRAPHS[format](path, model, images, about, outputs)
    difference = largest_difference(model, run, images)
    if not difference <= TOLERANCE:
        raise UserError(
            f"save_encoder: the {format} graph computes something else than {about['encoder']['name']}: the outputs "
            f"differ by {difference:.1e} of the largest one, and {TOLERANCE:.0e} is allowed. Nothing was written. "
            "Please report this with the arguments of the encoder and the versions of torch and onnx."
        )
    return difference


def traceable(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a copy of an encoder for tracing, and the shape (C, height, width) of its images.

    The copy is on the CPU, in float32 and in evaluation mode.

    Args:
        model: The encoder. It is not changed.
        img_size: Image size in pixels, one number or (height, width); None for the image size of the encoder.

    Raises:
        ValueError: If `img_size` is invalid.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    channels, *size = get_model_input_config(model)["input_size"]
    height, width = size if img_size is None else to_height_width(img_size)
    if (height, width) != tuple(size) and hasattr(model, "set_input_size"):
        cast(Any, model).set_input_size(img_size=(height, width))
    return model, (channels, height, width)


def write_program(
    path: Path, model: nn.Module, images: tuple[int, int, int], about: dict[str, Any], outputs: Sequence[str]
) -> Runner:
    """Write a file that `torch.export.load` reads, and return a function that runs it.

    Args:
        path: Path of the new file.
        model, images: As in `write_traced`.
        about: Description of the weights. It becomes an extra file in the archive.
        outputs: Names of the outputs. A program returns them in this order, without names.
    """
    content = io.BytesIO()
    torch.export.save(_traced(model, images), content, extra_files={f"{DESCRIPTION}.json": json.dumps(about)})
    path.write_bytes(content.getbuffer())
    content.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # the buffer is only read
        run = torch.export.load(content).module()
    return lambda batch: _listed(run(batch))


def write_onnx(
    path: Path, model: nn.Module, images: tuple[int, int, int], about: dict[str, Any], outputs: Sequence[str]
) -> Runner:
    """Write an ONNX model with the input "images" and the outputs of the given names.

    Arguments and result are those of `write_program`. `about` goes to the metadata of the model.

    Raises:
        ValueError: If a package is not installed, or if the weights are too large for one file.
    """
    _check_onnx(model)
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns about its own code
        program: Any = torch.onnx.export(
            _traced(model, images),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(outputs),
        )
    program.model.metadata_props[DESCRIPTION] = json.dumps(about)
    content = program.model_proto.SerializeToString()
    path.write_bytes(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(one) for one in session.run(None, {"images": batch.numpy()})]


@torch.no_grad()
def largest_difference(model: nn.Module, run: Runner, images: tuple[int, int, int]) -> float:
    """Compare the outputs of a written graph and of the model on random images.

    The batches have other sizes than the traced batch.

    Args:
        model: The model.
        run: Function that runs the graph.
        images: Shape of an image, (C, height, width).

    Returns:
        The largest absolute difference of two outputs, divided by the largest absolute value of this output of the
        model. Infinite if an output of the graph is not finite.
    """
    noise = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (torch.randn(count, *images, generator=noise) for count in _TRIED):
        for expected, found in zip(_listed(model(batch)), run(batch), strict=True):
            difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
            worst = max(worst, difference if torch.isfinite(found).all() else float("inf"))
    return worst


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _traced(model: nn.Module, images: tuple[int, int, int]) -> torch.export.ExportedProgram:
    batch = torch.zeros(_TRACED, *images)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(model, (batch,), dynamic_shapes=shapes, strict=False)
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of our source files, which would be most of a small export
    return program


def _check_onnx(model: nn.Module) -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"save_encoder: format onnx is written with {', '.join(_ONNX_PACKAGES)}; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. pip install {' '.join(missing)}"
        )
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes >= _ONNX_BYTES:
        raise UserError(
            f"save_encoder: an ONNX file holds less than 2 GiB; got {num_bytes:,} bytes of weights. Write torch_export."
        )


GRAPHS = {"torch_export": write_program, "onnx": write_onnx}
