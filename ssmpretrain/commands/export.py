"""`ssmpretrain export`: the encoder in a run or a checkpoint, written for others to read."""

import argparse

from ssmpretrain.encoders import load_encoder, save_encoder
from ssmpretrain.encoders.export import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="the folder of a run, or any file load_encoder reads")
    parser.add_argument("out", metavar="OUT", help="a new file, or for timm a new folder; nothing is overwritten")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: OUT.safetensors for load_encoder; timm: a folder for timm.create_model; "
        "official: OUT.pth for hustvl/Vim or MzeroMiko/VMamba; torch_export: OUT.pt2 for torch.export.load; "
        "onnx: OUT.onnx, for inference on a CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=pixels,
        metavar="PIXELS",
        help="for torch_export and onnx: image size, such as 384 or 384x512, height first; without, the encoder's own",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="write the moving average of the weights, or the weights in training; without either, "
        "what the file calls its model",
    )


def run(args: argparse.Namespace) -> int:
    """Load the encoder, write it in the format asked for, and say what was done and how it is read.

    Returns:
        0.

    Raises:
        ValueError, OSError: If one cannot be read or the other not written; the message is complete.
    """
    model = load_encoder(args.source, ema=args.ema, keep_dtypes=True)
    saved = save_encoder(model, args.out, args.format, img_size=args.image_size)
    print(f"loaded {model.load_report}")
    print(f"wrote {saved}")
    print(f"read it with  {saved.read_with}" + (f"  ({saved.note})" if saved.note else ""))
    return 0


def pixels(word: str) -> int | tuple[int, int]:
    """A size such as "384" or "384x512" as one number or (height, width)."""
    height, _, width = word.partition("x")
    return (int(height), int(width)) if width else int(height)
