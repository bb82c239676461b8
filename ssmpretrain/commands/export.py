"""`export`: write an encoder, both towers of CLIP, or a whole dense model in a format for other programs."""

import argparse

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared.encoding import add_teacher
from ssmpretrain.encoders import SaveReport, load_encoder, save_encoder
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.formats import FORMATS
from ssmpretrain.encoders.weights.graphs import GRAPHS
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.encoders.weights.provenance import summary

_OPEN_CLIP = "open_clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="the folder of a run, or any file load_encoder reads")
    parser.add_argument(
        "out", metavar="OUT", help="a new file, or for timm and open_clip a new folder; nothing is overwritten"
    )
    parser.add_argument(
        "--format",
        choices=(*FORMATS, _OPEN_CLIP),
        default="safetensors",
        help="safetensors: OUT.safetensors for load_encoder; timm: a folder for timm.create_model; "
        "official: OUT.pth for hustvl/Vim or MzeroMiko/VMamba; torch_export: OUT.pt2 for torch.export.load; "
        "onnx: OUT.onnx, for inference on a CPU; these two write the whole model of a run of Segmentation, and encoder "
        "and neck of a run of Detection; open_clip: a folder for open_clip's local-dir:, with both towers of a "
        "run of CLIP (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="for torch_export and onnx: image size, such as 384 or 384x512, height first; without, the encoder's own, "
        "or of a dense run that of its training images",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="write the moving average of the weights, or with --no-ema the weights in training "
        "(default: the weights that the run reports)",
    )
    add_teacher(parser)


def run(args: argparse.Namespace) -> int:
    """Load the encoder or both towers, write them in the chosen format, and print the code that reads the result.

    Returns:
        0.

    Raises:
        ValueError, OSError: If the source cannot be read, or the output cannot be written.
    """
    if args.format == _OPEN_CLIP:
        loaded, saved = _both_towers(args)
    else:
        loaded, saved = (args.format in GRAPHS and _dense_model(args)) or _encoder(args)
    print(f"loaded {loaded}")
    print(f"wrote {saved}")
    print(f"read it with  {saved.read_with}" + (f"  ({saved.note})" if saved.note else ""))
    return 0


def _encoder(args: argparse.Namespace) -> tuple[str, SaveReport]:
    """Write the encoder; return a description of the loaded weights, and the report of writing."""
    model = load_encoder(args.source, ema=args.ema, teacher=args.teacher, keep_dtypes=True)
    return str(model.load_report), save_encoder(model, args.out, args.format, img_size=args.image_size)


def _dense_model(args: argparse.Namespace) -> tuple[str, SaveReport] | None:
    """Write the model of a run of a dense task; return what `_encoder` returns, or None for any other source."""
    content = read_content(path := weights_in(args.source))
    if not (isinstance(content, dict) and "objective" in content):
        return None
    # An objective imports Lightning, which takes seconds; exported and published files do without.
    from ssmpretrain.objectives.dense import Dense
    from ssmpretrain.objectives.dense.export import save_dense
    from ssmpretrain.objectives.restore import restore

    run = restore(content, path, Dense, args.ema)  # type: ignore[type-abstract]
    if run is None:
        return None
    _refuse_teacher(args, f"a run of {type(run.model).__name__}")
    options = {"images": run.images, "origin": run.origin, "img_size": args.image_size}
    return f"{summary(run.origin)} from {run.path}", save_dense(run.model, args.out, args.format, **options)


def _both_towers(args: argparse.Namespace) -> tuple[str, SaveReport]:
    """Write both towers; return a description of the loaded weights, and the report of writing."""
    if args.image_size is not None:
        raise UserError(f"export: --image-size is for torch_export and onnx; got it for {_OPEN_CLIP}. Leave it out.")
    _refuse_teacher(args, _OPEN_CLIP)
    # An objective imports Lightning, which takes seconds; the other formats do without.
    from ssmpretrain.objectives.contrastive.open_clip_export import save_open_clip
    from ssmpretrain.objectives.restore import load_contrastive

    run = load_contrastive(args.source, args.ema)
    return f"{summary(run.origin)} from {run.path}", save_open_clip(run, args.out)


def _refuse_teacher(args: argparse.Namespace, what: str) -> None:
    if args.teacher:
        raise UserError(f"export: --teacher is for runs with a teacher, such as DINO; got it for {what}. Leave it out.")


def pixels(word: str) -> int | tuple[int, int]:
    """Read a size such as "384" or "384x512" as one number or (height, width)."""
    height, _, width = word.partition("x")
    return (int(height), int(width)) if width else int(height)
