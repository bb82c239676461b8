"""Taps: maps of an encoder after some blocks or stages, of images of any size, for dense tasks.

B images, H x W pixels, C_i channels and s_i stride of map i
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.maps import freeze_all_but, take_indices

_log = logging.getLogger(__name__)

TapRead = Literal["stream", "mixer"]
TapNorm = Literal["fresh", "final", "none"]
_DEFAULT_TAPS = 4  # of an encoder with one stride
_FINEST = 4  # smallest stride of the default taps of a pyramid
_FRESH_EPS = 1e-5
_TRIED = (64, 96)  # height and width in pixels of the image that is tried


@dataclass
class Taps:
    """Choice of the maps that an encoder gives to a dense head.

    Args:
        indices: Blocks of an encoder with one stride, or stages of a pyramid, counted from 0; negative numbers count
            from the end. None takes the stages with stride 4 and above of a pyramid, and four evenly spaced blocks of
            other encoders: 5, 11, 17 and 23 of 24. With Vim's `bidirectional="layer"`, pairs of blocks are counted.
        read: Place in a block. "stream": the sum that the next block reads. "mixer": the output of the mixer alone, as
            Vim's published segmentation code for the tiny size reads it; of Vim only.
        norm: Norm of the maps. "fresh": a LayerNorm of the channels for each map, as in the published dense code of
            VMamba, Swin and ConvNeXt. Its weights are fresh, unless the encoder comes from a published dense checkpoint
            with such norms. "final": the encoder's own final norm, on every map of an encoder with one stride, and on
            the last map of a pyramid. "none": no norm. None takes the default of the family: "fresh" for VMamba, Swin
            and ConvNeXt, "none" for the others.
        class_token: Whether class tokens are in the sequence while the blocks run. The maps never contain them. None
            takes the default of the encoder: Vim runs without a class token, as in its published dense code, other
            encoders and a Vim with registers run with them.
    """

    indices: list[int] | None = None
    read: TapRead = "stream"
    norm: TapNorm | None = None
    class_token: bool | None = None


class TappedEncoder(nn.Module):
    """Read maps of images of any size from an encoder: (B, 3, H, W) to a list of (B, C_i, ceil(H/s_i), ceil(W/s_i)).

    Images are padded at the right and below with 0, the mean pixel after normalisation, as far as the encoder needs:
    Vim and ViT to their patches, Swin and ConvNeXt to their largest stride, VMamba with overlapping convolutions not at
    all. Maps are cut back to the size in the contract. Positions of Vim, ARM and ViT are resized to each image.

    The padding is read like a part of the image. A convolution near the border sees zeros, as it does without padding.
    A scan along rows passes through the padding at the end of each row. A scan along columns passes through it below
    each column, and a backward scan begins in it. So padding changes all features of Vim and VMamba a little, not only
    those at the border; attention over the whole image changes in the same way. Batches with images of different sizes
    are padded too, so the maps of an image depend on the size of its batch.

    Parameters that the maps do not depend on are frozen: later blocks, the final norm unless it is read, pooling and
    head, and class tokens that are left out. They stay in the state dict, so `load_encoder` reads the checkpoint of a
    run. Distributed training would otherwise wait for their gradients.

    Args:
        encoder: An encoder of this package, of timm, or of another package, with timm's `feature_info` and
            `forward_intermediates`. It is changed in place so that it accepts images of any size. One small image is
            tried at once.
        taps: Choice of the maps.
        registers_encoder: Whether the encoder is a submodule. False if another module registers it, so that a state
            dict holds it once; that module then moves the encoder and sets its mode.

    Attributes:
        encoder: The encoder.
        indices: Numbers of the blocks or stages, ascending.
        channels: C_i of each map.
        strides: s_i of each map in pixels, ascending.
        is_pyramid: Whether the encoder has maps with different strides.

    Raises:
        ValueError: If an index is out of range or occurs twice, if the encoder does not support a choice, or if it
            takes only images of one size.
    """

    def __init__(self, encoder: nn.Module, taps: Taps | None = None, *, registers_encoder: bool = True) -> None:
        super().__init__()
        taps = taps or Taps()
        self.encoder: nn.Module
        if registers_encoder:
            self.encoder = encoder
        else:
            vars(self)["encoder"] = encoder  # `nn.Module.__setattr__` would register it
        self._family = family_of(encoder)
        where = f"taps of {type(encoder).__name__}"
        for name in ("forward_intermediates", "feature_info"):
            if not hasattr(encoder, name):
                raise UserError(f"{where}: an encoder has timm's {name}; this one lacks it. Choose another encoder.")
        info: list[dict[str, Any]] = list(cast(Any, encoder).feature_info)
        self.is_pyramid: bool = info[0]["reduction"] != info[-1]["reduction"]
        self.indices = self._checked_indices(where, info, taps.indices)
        self.channels: list[int] = [info[index]["num_chs"] for index in self.indices]
        self.strides: list[int] = [info[index]["reduction"] for index in self.indices]
        self.read = self._checked_read(where, taps.read)
        self.norm = self._checked_norm(where, taps.norm, len(info))
        self.class_token = self._checked_class_token(where, taps.class_token)
        fresh = zip(self.indices, self.channels, strict=True) if self.norm == "fresh" else ()
        self.norms = nn.ModuleDict({str(index): LayerNorm2d(width, eps=_FRESH_EPS) for index, width in fresh})

        self._fill_norms(where)
        self._family.prepare_taps(encoder)
        self._freeze_unread(where)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of normalised images (B, 3, H, W), each (B, C_i, ceil(H/s_i), ceil(W/s_i)), finest first."""
        height, width = images.shape[-2:]
        rows, columns = self._family.tap_size(self.encoder, (height, width))
        if (rows, columns) != (height, width):
            images = F.pad(images, (0, columns - width, 0, rows - height))
        maps = self._family.tap(
            self.encoder,
            images,
            self.indices,
            read=self.read,
            norm=self.norm == "final",
            class_token=self.class_token,
        )
        maps = [one[..., : -(-height // s), : -(-width // s)] for one, s in zip(maps, self.strides, strict=True)]
        if self.norm != "fresh":
            return maps
        return [norm(one) for norm, one in zip(self.norms.values(), maps, strict=True)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of the encoder on or off."""
        cast(Any, self.encoder).set_grad_checkpointing(enable)

    def _freeze_unread(self, where: str) -> None:
        """Compute the maps of a small image, and freeze the parameters that they do not depend on."""
        weight, was_training = next(self.encoder.parameters()), self.encoder.training
        channels = next((one.in_channels for one in self.encoder.modules() if isinstance(one, nn.Conv2d)), 3)
        self.encoder.eval()
        try:
            with torch.enable_grad():
                maps = self(weight.new_zeros(1, channels, *_TRIED))
        except UserError:
            raise
        except Exception as error:  # the encoder may be of any package
            raise UserError(
                f"{where}: an encoder reads images of any size; this one fails with {_TRIED[0]} x {_TRIED[1]} pixels "
                f"({(str(error) or type(error).__name__).splitlines()[0]:.120}). Build it with "
                "encoder_args.dynamic_img_size true if it has this argument, or choose another encoder."
            ) from error
        finally:
            self.encoder.train(was_training)
        sizes = zip(self.channels, self.strides, strict=True)
        expected = [(width, -(-_TRIED[0] // stride), -(-_TRIED[1] // stride)) for width, stride in sizes]
        if (found := [tuple(one.shape[1:]) for one in maps]) != expected:
            raise UserError(
                f"{where}: feature_info gives channels and strides of the maps, for {_TRIED[0]} x {_TRIED[1]} pixels "
                f"{expected}; got {found}. Correct feature_info of the encoder or tap_size of its family."
            )
        freeze_all_but(self.encoder, maps)

    def _fill_norms(self, where: str) -> None:
        """Copy the norms that `load_encoder` found in the file of a dense task, if there are any."""
        found: dict[int, dict[str, Tensor]] = getattr(self.encoder, "tap_norms", {})
        if found and self.norm != "fresh":
            _log.warning("%s: the encoder's file has norms for 'fresh'; norm=%r leaves them out", where, self.norm)
            return
        if found and (lacking := sorted({*self.indices} - found.keys())):
            raise UserError(
                f"{where}: the encoder's file has norms of the stages {sorted(found)}, and taps.indices also names "
                f"{lacking}. Take the stages in the file, or another file."
            )
        for index, norm in found.items():
            if index in self.indices:
                self.norms[str(index)].load_state_dict(norm)

    def _checked_indices(self, where: str, info: Sequence[dict[str, Any]], wanted: list[int] | None) -> list[int]:
        what = "stages" if self.is_pyramid else "blocks"
        indices = sorted(take_indices(where, what, len(info), self._default(info) if wanted is None else wanted)[0])
        if len(set(indices)) < len(indices):
            raise UserError(f"{where}: every index names another of {len(info)} {what}; got {wanted}. Name each once.")
        return indices

    def _default(self, info: Sequence[dict[str, Any]]) -> list[int]:
        count = len(info)
        if self.is_pyramid:
            return [index for index in range(count) if info[index]["reduction"] >= _FINEST]
        if count <= _DEFAULT_TAPS:
            return list(range(count))
        return [(part + 1) * count // _DEFAULT_TAPS - 1 for part in range(_DEFAULT_TAPS)]

    def _checked_read(self, where: str, read: str) -> str:
        able = self._family.tap_reads(self.encoder)
        if read not in able:
            raise UserError(
                f"{where}: read is {' or '.join(able)}; got {read!r}. Only Vim's blocks with one mixer have 'mixer'."
            )
        return read

    def _checked_norm(self, where: str, norm: str | None, stages: int) -> str:
        norm = self._family.tap_norm if norm is None else norm
        if norm not in ("fresh", "final", "none"):
            raise UserError(f"{where}: norm is one of fresh, final and none; got {norm!r}.")
        if norm == "final" and self.is_pyramid and self.indices[-1] != stages - 1:
            raise UserError(
                f"{where}: norm='final' is the norm of the last of {stages} stages; got indices {self.indices}. "
                "Use norm='fresh', or take the last stage too."
            )
        return norm

    def _checked_class_token(self, where: str, class_token: bool | None) -> bool:
        able = self._family.tap_class_token_of(self.encoder)
        if class_token is None:
            return able[0]
        if class_token not in able:
            raise UserError(
                f"{where}: class_token is {able[0]}, because its blocks need the class tokens in place; got "
                f"{class_token}. Leave it out."
            )
        if class_token and not self._family.has_class_token(self.encoder):
            raise UserError(f"{where}: class_token=True keeps a class token; this encoder has none. Leave it out.")
        return class_token
