"""Export of dense runs as graphs, `torch.export` programs and ONNX, which run without this package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmpretrain.encoders.sequence.patch_embed import to_height_width
from ssmpretrain.encoders.weights.arguments import detached
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.formats import how_to_read, new_path, whole_export
from ssmpretrain.encoders.weights.graphs import write_traced
from ssmpretrain.encoders.weights.provenance import describe_weights
from ssmpretrain.encoders.weights.save import NOT_WRITTEN, SaveReport
from ssmpretrain.objectives.dense.dense import Dense

_ALL, _OF_THE_MAPS = "", ("encoder.", "tapped.", "neck.")  # beginnings of the names of the tensors in a graph


class _Graph(nn.Module):
    """Call one method of an objective as `forward`."""

    def __init__(self, objective: Dense, method: str) -> None:
        super().__init__()
        self.objective, self.method = objective, method

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return getattr(self.objective, self.method)(images)  # type: ignore[no-any-return]


def save_dense(
    model: Dense,
    path: str | Path,
    format: str,
    *,
    images: dict[str, Any],
    origin: dict[str, Any],
    img_size: int | tuple[int, int] | None = None,
) -> SaveReport:
    """Write the graph of a dense run to a new file, run it, and compare it with the model.

    A run of `Segmentation` becomes a graph from images (B, 3, H, W) to "logits", (B, K, H, W), one score per class and
    pixel. A run of `Detection` becomes a graph of the encoder and the neck, from images to "map_4", "map_8" and so on,
    (B, C, h, w), named by their strides: the selection of boxes depends on their values and is not in the graph. Each
    graph takes any number of images of one size. The description in the file, see `describe_weights`, also has the
    entry "dense": the name of the objective, the number of classes, and the names of the outputs.

    Args:
        model: The objective, with its weights.
        path: Path of the new file. Parent folders are created.
        format: "torch_export" or "onnx", as in `save_encoder`.
        images: Image preprocessing, see `images_of`.
        origin: Origin of the weights, see `describe_weights`.
        img_size: Image size in pixels, one number or (height, width); None for the size of the training images. Any
            size fits, because the graph pads an image as the model does.

    Returns:
        A report of the export.

    Raises:
        ValueError: If `path` already exists, cannot be written or has the wrong suffix; if a package is missing; if
            graph and model give different outputs; or if a weight is NaN or infinite.
    """
    path = new_path(path, format)
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    where, (method, output) = type(model).__name__, model.exported
    read = _ALL if method == "forward" else _OF_THE_MAPS
    tensors = {key: tensor for key, tensor in detached(model).items() if key.startswith(read)}
    check_finite("export", tensors, where, NOT_WRITTEN)
    outputs = [output] if method == "forward" else [f"{output}_{stride}" for stride in model.neck.strides]
    height, width = images["size"] if img_size is None else to_height_width(img_size)
    about = describe_weights(model.encoder, model.encoder_name, model.encoder_args, tensors)
    about |= {"images": images, "origin": origin}
    about["dense"] = {"objective": where, "num_classes": model.num_classes, "outputs": outputs}
    with whole_export(path) as partial:
        difference = write_traced(partial, format, _Graph(model, method), (3, height, width), about, outputs)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    read_with, _ = how_to_read(path, format, model.encoder, "")
    note = f"images (B, 3, {height}, {width}) to {', '.join(outputs)}"
    note += "" if method == "forward" else ", of encoder and neck; the boxes are not in the graph"
    name = f"{where} with {model.encoder_name}"
    return SaveReport(path, format, name, len(tensors), num_bytes, read_with, note, difference)
