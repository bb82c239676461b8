"""`detect`: the objects in images, as pictures for people and as COCO's json for programs."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.commands.shared import dense_run, pictures
from ssmpretrain.commands.shared.dense_run import DenseRun, load_dense_run
from ssmpretrain.commands.shared.pictures import find_pictures, save_picture
from ssmpretrain.evaluation.dense import draw_detections, mask_area, paste_masks
from ssmpretrain.objectives import Detection

_PICTURE, _RESULTS = "pictures/{}.png", "detections.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    dense_run.add_arguments(parser)
    pictures.add_arguments(parser, out="detected")
    parser.add_argument(
        "--score",
        type=float,
        default=0.5,
        help=f"least score of an object that is drawn; {_RESULTS} holds all (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write a picture of each image and all detections in one file, and print the objects of each image."""
    if not 0 <= args.score <= 1:
        raise UserError(f"detect: --score is from 0 to 1; got {args.score}. 0.5 is usual.")
    found = find_pictures(args, (_PICTURE, _RESULTS), where="detect")
    run = load_dense_run(args, Detection, "segment", where="detect")
    print(f"{found.out}: {run}; objects of score {args.score:g} and more are drawn")
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, image in found.decoded():
        height, width = image.shape[1:]
        detections = _detect(run, image)
        images.append({"id": len(images) + 1, "file_name": str(found.paths[name]), "height": height, "width": width})
        annotations += _rows(detections, len(images), len(annotations))
        drawn = _at_least(detections, args.score)
        save_picture(draw_detections(image, names=run.classes, **drawn), found.out / _PICTURE.format(name))
        print(f"  {shown(name)}: {_objects(drawn['classes'], run.classes)}", flush=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(run.classes, 1)]
    results = {"images": images, "categories": categories, "annotations": annotations}
    replace_json(found.out / _RESULTS, results, indent=None)
    for line in found.lines():
        print(line)
    return 0


def _detect(run: DenseRun[Detection], image: Tensor) -> dict[str, Any]:
    """Detect the objects of an image (3, H, W): boxes in its pixels, scores, classes, and masks or None."""
    height, width = image.shape[1:]
    with torch.inference_mode():
        prepared = run.prepare(image)
        h, w = prepared.shape[-2:]
        (found,) = run.model.detect(prepared, torch.tensor([[h, w]]))
    found = {name: value.cpu() for name, value in found.items()}
    boxes = found["boxes"].float() * torch.tensor([width / w, height / h] * 2)
    if not (boxes.isfinite().all() and found["scores"].isfinite().all()):
        raise UserError(f"detect: boxes and scores are finite; those of {run.path} are not. Try another checkpoint.")
    masks = paste_masks(found["masks"], boxes, height, width) if "masks" in found else None
    return {"boxes": boxes, "scores": found["scores"], "classes": found["classes"], "masks": masks}


def _at_least(detections: dict[str, Any], score: float) -> dict[str, Any]:
    kept = (detections["scores"] >= score).nonzero().flatten()
    masks = detections["masks"]
    tensors = {name: detections[name][kept] for name in ("boxes", "scores", "classes")}
    return {**tensors, "masks": None if masks is None else [masks[number] for number in kept.tolist()]}


def _rows(detections: dict[str, Any], image: int, before: int) -> list[dict[str, Any]]:
    """Return the detections of an image as annotations of COCO with a score; ids go on after `before`."""
    columns = [detections[name].tolist() for name in ("boxes", "scores", "classes")]
    rows = []
    for number, ((x1, y1, x2, y2), score, category) in enumerate(zip(*columns, strict=True)):
        row = {
            "id": before + number + 1,
            "image_id": image,
            "category_id": category + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "score": score,
        }
        if detections["masks"] is not None:
            code = detections["masks"][number]
            row |= {"segmentation": code, "area": mask_area(code)}
        rows.append(row)
    return rows


def _objects(classes: Tensor, names: list[str]) -> str:
    """Count the objects of an image by class."""
    counts = Counter(shown(names[k]) for k in classes.tolist())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no object"
