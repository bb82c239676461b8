"""`zeroshot`: classify images by the names of their classes and retrieve them by captions."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.commands.shared import evaluation_data, two_towers
from ssmpretrain.commands.shared.evaluation_data import EvaluationData, config_of_run, load_data, skipped_lines
from ssmpretrain.commands.shared.new_files import check_new
from ssmpretrain.commands.shared.paired_embeddings import Embedded, embed, save_embeddings
from ssmpretrain.commands.shared.two_towers import TwoTowers, load_towers
from ssmpretrain.evaluation.accuracy import percent
from ssmpretrain.evaluation.retrieval import KS
from ssmpretrain.evaluation.zero_shot_accuracy import ZeroShotAccuracy, number_by_names
from ssmpretrain.objectives.contrastive.named_classes import class_names, classifier, templates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    two_towers.add_arguments(parser)
    evaluation_data.add_arguments(parser, "data")
    parser.add_argument(
        "--captions",
        nargs="+",
        metavar="FIELD",
        help="field of the captions in the shards of --data, txt or json.FIELD; adds retrieval",
    )
    classes = parser.add_argument_group("classes", "by default those of the run's data or of its ZeroShot callback")
    classes.add_argument(
        "--classes",
        help="names in the order of the labels: imagenet, a file (one name a line, or JSON: a list or {label: name}), "
        "or a,b,c",
    )
    classes.add_argument(
        "--templates", help='openai (80), simple (7), a file, or a sentence: "a photo of a {}." (default: openai)'
    )
    parser.add_argument("--json", metavar="OUT", help="write the results to this new .json file too")
    parser.add_argument("--save", metavar="OUT", help="write all embeddings to this new .npz file")


@dataclass(frozen=True)
class Classes:
    """Classes and templates of a zero-shot classification.

    Attributes:
        names: Names of the classes, in the order of the labels.
        templates: Sentences with {} for the name.
        held_out_labels: Labels of classes that do not occur in training.
    """

    names: list[str]
    templates: list[str]
    held_out_labels: list[int]


def run(args: argparse.Namespace) -> int:
    """Encode images, classes and captions, and print the accuracies of classification and retrieval.

    Under torchrun all ranks share the work, with the same results as one process.
    """
    out = check_new(args.json, (".json",), where="zeroshot") if args.json else None
    save = check_new(args.save, (".npz",), where="zeroshot") if args.save else None
    with ranks.joined_ranks():
        towers = load_towers(args, where="zeroshot")
        online = _of_callback(args)
        data = _load_data(args, online, towers)
        classes = _classes(args, online, data.module)
        if classes is not None:
            data.use_labels()
        columns = classify_by(towers, classes)
        found = embed(towers, data.batches("val", None))
        results = _results(found, classes, columns, towers, data)
        if save is not None:
            save_embeddings(save, found, towers, _more(classes, columns, results))
        if ranks.rank() > 0:
            return 0
    print(*_lines(results, towers), sep="\n")
    if out is not None:
        replace_json(out, results)
    return 0


# Arguments


def _of_callback(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the run's callback `ZeroShot`; an empty dictionary without it, or if --data is given."""
    if args.data or (found := config_of_run(args.checkpoint, "zeroshot", "--data")) is None:
        return {}
    path, config = found
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        if callback["class_path"].endswith(".ZeroShot"):
            given = {name: value for name, value in (callback.get("init_args") or {}).items() if value is not None}
            for name in ("data", "classes", "templates"):
                words = given.get(name, [])
                if not all(isinstance(word, str) for word in (words if isinstance(words, list) else [words])):
                    raise UserError(
                        f"zeroshot: {name} of ZeroShot in {path} is a text or a list of such; got {str(words)[:80]}. "
                        "Correct it, or name images with --data."
                    )
            return given
    return {}


def _load_data(args: argparse.Namespace, online: dict[str, Any], towers: TwoTowers) -> EvaluationData:
    named = args.data or online.get("data")
    if args.captions and not args.data:
        raise UserError("zeroshot: --captions is for shards named by --data; got no --data. Leave it out.")
    paths = [named] if isinstance(named, str) else named
    data = load_data(args, towers, None, paths, caption=args.captions, flags="--data")
    if hasattr(data.module, "tokenizer"):
        data.module.tokenizer = towers.tokenizer  # workers of the loader tokenise
    return data


def _classes(args: argparse.Namespace, online: dict[str, Any], module: Any) -> Classes | None:
    """Return the classes; None if only retrieval is possible."""
    own = None if args.data or "data" in online else module  # the run's data, which may name classes and templates
    held_out = list(getattr(own, "held_out", []))
    source = args.classes or online.get("classes") or getattr(module, "classes", None)
    if not source:
        if hasattr(module, "tokenizer") and not args.templates:
            return None
        raise UserError("zeroshot: every label has a name; got no --classes. Give imagenet, a file of names, or a,b,c.")
    names = class_names(source, where="zeroshot")
    if not held_out:  # held-out labels follow the data's own order, which then stays
        number_by_names(module, names, where="zeroshot")
    sentences = args.templates or online.get("templates") or getattr(own, "templates", None) or "openai"
    return Classes(names, templates(sentences, where="zeroshot"), held_out)


# Results


def classify_by(towers: TwoTowers, classes: Classes | None) -> Tensor | None:
    """Embed the classes as columns (E, C), on the CPU; None without classes."""
    if classes is None:
        return None
    found = classifier(towers.encode_text, towers.tokenizer, classes.names, classes.templates, towers.device)
    return found.cpu()


def _results(
    found: Embedded, classes: Classes | None, columns: Tensor | None, towers: TwoTowers, data: EvaluationData
) -> dict[str, Any]:
    """Compute all results to print and to write; they are the same on every rank."""
    results: dict[str, Any] = {**towers.protocol(), "data": data.describe("val"), "skipped": data.skipped("val")}
    results["num_images"] = sum(ranks.gather(len(found.keys)))
    if not results["num_images"]:
        raise UserError("zeroshot: no image to classify. Check that the data path holds usable images.")
    results["zero_shot"] = results["retrieval"] = None
    if classes is not None and columns is not None:
        accuracy = ZeroShotAccuracy(columns, classes.held_out_labels, where="zeroshot")
        for image, label in zip(found.image, found.label, strict=True):
            accuracy.add(image, label)
        if rates := accuracy.result(lambda counts: torch.stack(ranks.gather(counts)).sum(dim=0)):
            results["zero_shot"] = {**rates, "chance": 1 / len(classes.names), **asdict(classes)}
    if num_captions := sum(ranks.gather(found.num_captions)):
        about = {"images": found.retrieval.num_images(), "captions": num_captions, "cut": sum(ranks.gather(found.cut))}
        chance = {f"chance_r{k}": min(1.0, k / about["images"]) for k in KS}
        results["retrieval"] = {**found.retrieval.result(towers.device), **about, **chance}
    if results["zero_shot"] is None and results["retrieval"] is None:
        raise UserError(
            f"zeroshot: images have a label or captions; none of {results['num_images']:,} has. "
            "Name labelled images with --data, or say with --captions where the captions are."
        )
    return results


def _more(classes: Classes | None, columns: Tensor | None, results: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays that the file of --save holds beside the embeddings."""
    about = {"metadata": np.asarray(json.dumps(results))}
    if classes is None or columns is None:
        return about
    held_out = np.asarray(classes.held_out_labels, dtype=np.int64)
    names = np.asarray(classes.names)
    return {**about, "class_embeddings": columns.T.numpy(), "class_names": names, "held_out_labels": held_out}


# Lines


def _lines(results: dict[str, Any], towers: TwoTowers) -> list[str]:
    lines = [f"loaded {towers.path}", f"{results['num_images']:,} images; {towers}"]
    lines += skipped_lines("data", results["skipped"])
    if (zero := results["zero_shot"]) is not None:
        lines += _zero_shot_lines(zero, results["num_images"])
    if (retrieval := results["retrieval"]) is not None:
        lines += _retrieval_lines(retrieval)
    return lines


def _zero_shot_lines(zero: dict[str, Any], num_images: int) -> list[str]:
    names, sentences = len(zero["names"]), len(zero["templates"])
    chance, five = zero["chance"], min(1.0, 5 * zero["chance"])
    lines = [f"zero-shot, {zero['images']:,} images of {names:,} classes, {sentences} template{'s' * (sentences > 1)}:"]
    lines += [f"  top-1 {percent(zero['top1'])}   (chance {percent(chance)})"]
    lines += [f"  top-5 {percent(zero['top5'])}   (chance {percent(five)})"]
    if "held_out" in zero:
        lines.append(f"  top-1 {percent(zero['held_out'])}   of the {len(zero['held_out_labels'])} held-out classes")
    if unlabelled := num_images - zero["images"]:
        lines.append(f"  left out: {unlabelled:,} images without a label")
    return lines


def _retrieval_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"retrieval, {found['images']:,} images and {found['captions']:,} captions:"]
    lines.append(f"{'':<16}" + "".join(f"{f'R@{k}':>10}" for k in KS))
    for what, prefix in (("image to text", "i2t_r"), ("text to image", "t2i_r"), ("chance", "chance_r")):
        lines.append(f"  {what:<14}" + "".join(f"{percent(found[f'{prefix}{k}']):>10}" for k in KS))
    if found["cut"]:
        lines.append(f"  {found['cut']:,} captions have more tokens than the text tower takes, and were cut")
    return lines
