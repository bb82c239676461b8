"""An encoder whose features are known by hand: the mean colour of each patch of 8 x 8 pixels."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn


class MeanColour(nn.Module):
    """One convolution without overlap; with the weights of `write_encoder` it averages each channel of a patch."""

    def __init__(self, num_classes: int = 0, **unused: Any) -> None:
        super().__init__()
        self.num_features, self.num_classes = 3, num_classes
        self.stem = nn.Conv2d(3, 3, 8, 8, bias=False)
        self.feature_info = [{"module": "stem", "num_chs": 3, "reduction": 8}]
        self.head = nn.Identity()
        self.pretrained_cfg = self.default_cfg = {"architecture": "mean_colour", "input_size": (3, 32, 32)}

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **unused: Any) -> Any:
        features = self.stem(x)
        return [features] if intermediates_only else (features, [features])

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        assert not num_classes


@register_model
def mean_colour(pretrained: bool = False, **kwargs: Any) -> MeanColour:
    return MeanColour(**{name: value for name, value in kwargs.items() if not name.startswith("pretrained")})


def write_encoder(path: Path) -> Path:
    """Write a file of the encoder, for images of 32 x 32 pixels with values from 0 to 1."""
    weight = torch.eye(3).view(3, 3, 1, 1).repeat(1, 1, 8, 8) / 64
    images = {"size": [32, 32], "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    content = {"encoder": {"name": "mean_colour", "args": {}}, "images": images, "model": {"stem.weight": weight}}
    torch.save(content, path)
    return path


def paint(path: Path, *colours: tuple[int, int, int]) -> Path:
    """Write an image of 32 x 32 pixels with stripes of these colours, from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32, 32))
    width = 32 // len(colours)
    for number, colour in enumerate(colours):
        image.paste(colour, (number * width, 0, (number + 1) * width, 32))
    image.save(path)
    return path
