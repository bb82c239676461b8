"""Shards of coloured pictures with captions and labels, and a CLIP small enough for them."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torchvision.io import encode_png

from ssmpretrain.datamodules import ImageTextShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.objectives import CLIP
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.contrastive.text_tower import TextTower

T = TypeVar("T", bound=Contrastive)
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
TEMPLATES = ("a {} square", "something {}")


class Colours(ImageTextShards):
    """Pictures of one colour that say what their classes are called, and that training never shows white."""

    classes, templates, held_out = tuple(COLOURS), TEMPLATES, (3,)


def picture(number: int) -> torch.Tensor:
    """(3, 32, 32), uint8: of colour `number % 4`, and noise that tells it from the others."""
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
    colour = torch.tensor(list(COLOURS.values())[number % 4], dtype=torch.float32).view(3, 1, 1)
    return ((0.6 * colour + 0.4 * noise) * 255).byte()


def captioned_shard(folder: Path, count: int = 16, labels: bool = True, start: int = 0) -> str:
    """Write a shard of pictures with two captions each in `json.captions`, the first of them in `txt`."""
    with ShardWriter(folder, "colours") as writer:
        for number in range(start, start + count):
            name = list(COLOURS)[number % 4]
            captions = [f"a {name} square number {number}", f"{number}: something {name}"]
            fields = {
                "png": encode_png(picture(number)).numpy().tobytes(),
                "txt": captions[0].encode(),
                "json": ('{"captions": ["' + '", "'.join(captions) + '"]}').encode(),
            }
            writer.write(f"{number:04d}", fields | ({"cls": str(number % 4).encode()} if labels else {}))
    return str(folder / "colours-*.tar")


def tiny_clip(objective: type[T] = CLIP, **settings: Any) -> T:
    """A Vim of two blocks and a text Transformer of one, for images of 32 x 32 pixels."""
    torch.manual_seed(0)
    text = TextTower(width=32, heads=2, layers=1, context_length=16)
    vim = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
    return objective("test_vim", vim, text=text, embed_dim=16, **settings)
