"""`detect`: the objects in images, as pictures for people and as COCO's json for programs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.base.wording import few
from ssmpretrain.commands.shared import dense_run, pictures
from ssmpretrain.commands.shared.dense_run import DenseRun, load_dense_run
from ssmpretrain.commands.shared.pictures import find_pictures, save_picture
from ssmpretrain.datamodules.dense.coco_file import CocoIds, ListedImage, read_coco_ids
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
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help=f"COCO file whose ids {_RESULTS} takes, of images by file name and of categories by name, so that the "
        "detections can be scored against it (default: ids count from 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Write a picture of each image and all detections in one file, and print the objects of each image."""
    if not 0 <= args.score <= 1:
        raise UserError(f"detect: --score is from 0 to 1; got {args.score}. 0.5 is usual.")
    found = find_pictures(args, (_PICTURE, _RESULTS), where="detect")
    ids = None if args.annotations is None else read_coco_ids(args.annotations, "detect")
    listed = {} if ids is None else _listed(found.paths, ids, args.annotations)
    run = load_dense_run(args, Detection, "segment", where="detect")
    categories = _categories(run.classes, ids, args.annotations)
    print(f"{found.out}: {run}; objects of score {args.score:g} and more are drawn")
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, image in found.decoded():
        height, width = image.shape[1:]
        entry = listed.get(name) or ListedImage(len(images) + 1, str(found.paths[name]), height, width)
        if (entry.height, entry.width) != (height, width):
            raise DataError(
                f"detect: an image has the size that --annotations says; {shown(entry.name)} has {width} x {height} "
                f"pixels, in {args.annotations} {entry.width} x {entry.height}. Correct one of them."
            )
        detections = _detect(run, image)
        images.append({"id": entry.id, "file_name": entry.name, "height": height, "width": width})
        annotations += _rows(detections, entry.id, categories, len(annotations))
        drawn = _at_least(detections, args.score)
        save_picture(draw_detections(image, names=run.classes, **drawn), found.out / _PICTURE.format(name))
        print(f"  {shown(name)}: {_objects(drawn['classes'], run.classes)}", flush=True)
    named = [{"id": number, "name": name} for number, name in zip(categories, run.classes, strict=True)]
    results = {"images": images, "categories": named, "annotations": annotations}
    replace_json(found.out / _RESULTS, results, indent=None)
    for line in (*found.lines(), *(_lines(ids, len(images), run.classes, args.annotations) if ids else ())):
        print(line)
    return 0


def _listed(paths: Mapping[str, Path], ids: CocoIds, file: str) -> dict[str, ListedImage]:
    """Return the entry of each image in the file of annotations, by the name of its results."""
    listed, missing = dict[str, ListedImage](), list[str]()
    for name, path in paths.items():
        if (entry := ids.image_at(path)) is None:
            missing.append(shown(str(path)))
        else:
            listed[name] = entry
    if missing:
        raise UserError(
            f"detect: --annotations lists each image by its file_name; {file} does not list {few(missing, 3)}. Give "
            "the images of this file, or leave out --annotations."
        )
    first = dict[ListedImage, str]()
    for name, entry in listed.items():
        if (other := first.setdefault(entry, name)) != name:
            raise UserError(
                f"detect: an image of --annotations is given once; got {shown(str(paths[other]))} and "
                f"{shown(str(paths[name]))} for {shown(entry.name)} of {file}. Leave out one of them."
            )
    return listed


def _categories(classes: Sequence[str], ids: CocoIds | None, file: str) -> list[int]:
    """Return the id of the category of each class: by its name in the file of annotations, or counted from 1."""
    if ids is None:
        return list(range(1, len(classes) + 1))
    if missing := [shown(name) for name in classes if name not in ids.categories]:
        has = few([shown(name) for name in ids.categories])
        raise UserError(
            f"detect: --annotations has a category of the name of each class; {file} has none for {few(missing)}; it "
            f"has {has}. Rename its categories, or leave out --annotations."
        )
    return [ids.categories[name] for name in classes]


def _lines(ids: CocoIds, images: int, classes: Sequence[str], file: str) -> list[str]:
    """Return lines that tell what of the file of annotations has no detections, and lowers their score."""
    lines = []
    if rest := len(ids.images) - images:
        lines.append(f"  {file}: {rest:,} of {len(ids.images):,} images have no detections; score the others alone")
    if unknown := [shown(name) for name in ids.categories if name not in classes]:
        lines.append(f"  {file}: categories that the run does not know: {few(unknown)}; score the others alone")
    return lines


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


def _rows(detections: dict[str, Any], image: int | str, categories: Sequence[int], before: int) -> list[dict[str, Any]]:
    """Return the detections of an image as annotations of COCO with a score; ids go on after `before`."""
    columns = [detections[name].tolist() for name in ("boxes", "scores", "classes")]
    rows = []
    for number, ((x1, y1, x2, y2), score, category) in enumerate(zip(*columns, strict=True)):
        row = {
            "id": before + number + 1,
            "image_id": image,
            "category_id": categories[category],
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
