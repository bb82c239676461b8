"""Export of both towers of a contrastive run: a folder that open_clip loads after `import ssmpretrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.timm_name import as_timm_name
from ssmpretrain.encoders.weights.arguments import detached, encoder_name, plain_args
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.formats import new_path, whole_export, write_safetensors
from ssmpretrain.encoders.weights.provenance import describe_weights
from ssmpretrain.encoders.weights.save import NOT_WRITTEN, SaveReport
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.contrastive.open_clip_adapter import load_open_clip
from ssmpretrain.objectives.contrastive.text_weights import OPEN_CLIP_CONFIG
from ssmpretrain.objectives.restore import Restored

WEIGHTS = "open_clip_model.safetensors"
# Largest allowed difference from open_clip's embeddings of length 1, in float32. Both sides do the same operations in
# the same order; only the batch has another size.
_TOLERANCE = 1e-5
_TRIED = 2  # images that the written folder is tested with
_TRIED_TEXTS = ["", "a photo of a cat", "words without end " * 40]


def save_open_clip(run: Restored[Contrastive], path: str | Path) -> SaveReport:
    """Write the model of a run as a folder for open_clip. Keep it only if open_clip computes the same embeddings.

    The function overwrites nothing, and leaves no unfinished folder at `path`.

    Args:
        run: The restored run.
        path: A new folder. It receives `open_clip_config.json`, with the architecture and the preparation of images,
            and `open_clip_model.safetensors`, with the description of `describe_weights` in its header.

    Raises:
        ValueError: If `path` exists or cannot be written, if open_clip has no such text tower, or if the model that
            open_clip loads computes other embeddings.
        OSError: If the folders above `path` cannot be made.

    Source: open_clip 3.3.0, `factory.create_model` with "local-dir:".
    """
    path, model = new_path(path, "open_clip"), run.model
    if model.hparams["text"]["kind"] != "transformer":
        raise UserError(
            f"save_open_clip: open_clip's text tower is a Transformer; got text.kind {model.hparams['text']['kind']}. "
            "Write the image tower alone, with --format safetensors or timm."
        )
    name = encoder_name(model.encoder)
    args = plain_args(model.encoder, name)
    config, tensors = _config(run, name, args), _state(model)
    check_finite("save_open_clip", tensors, str(run.path), NOT_WRITTEN)
    about = {**describe_weights(model.encoder, name, args, tensors), "images": run.images, "origin": run.origin}
    with whole_export(path) as partial:
        partial.mkdir()
        (partial / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(partial / WEIGHTS, tensors, about)
        difference = _largest_difference(run, partial)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    read_with = f"open_clip.create_model_and_transforms({f'local-dir:{path}'!r})"
    return SaveReport(path, "open_clip", name, len(tensors), num_bytes, read_with, _note(run), difference)


def _config(run: Restored[Contrastive], name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration from which open_clip builds the model and the preparation of its images."""
    model, images, text = run.model, run.images, run.model.hparams["text"]
    height, width = images["size"]
    size = height if height == width else [height, width]
    spelling = as_timm_name(name, _other_than_default(name, args))
    vision = {"timm_model_name": spelling, "timm_model_pretrained": False, "image_size": size}
    if _has_own_projection(model.encoder):
        vision |= {"timm_pool": args["global_pool"], "timm_proj": ""}
    else:
        vision |= {"timm_pool": "", "timm_proj": "linear", "timm_proj_bias": False}
    model_cfg: dict[str, Any] = {
        "embed_dim": model.contrastive.embed_dim,
        "custom_text": True,
        "init_logit_scale": model.hparams["init_logit_scale"],
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text["context_length"],
            "vocab_size": model.tokenizer.vocab_size,
            **{key: text[key] for key in ("width", "heads", "layers")},
        },
    }
    if text.get("quick_gelu", False):
        model_cfg["quick_gelu"] = True  # the timm tower keeps its own activation
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = model.hparams["init_logit_bias"]
    preprocess = {"size": size, "mode": "RGB", "mean": images["mean"], "std": images["std"]}
    preprocess |= {"interpolation": images["interpolation"], "resize_mode": "shortest"}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _other_than_default(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from the defaults of the encoder. open_clip removes the classifier itself."""
    with torch.device("meta"):
        default = plain_args(create_encoder(name), name)
    return {key: value for key, value in args.items() if key != "num_classes" and default.get(key, ...) != value}


def _has_own_projection(encoder: Any) -> bool:
    """Return whether layers between pooling and classifier make the features wider, as in MambaOut.

    open_clip's projection has the width of the pooled features. Such an encoder's classifier becomes the projection.
    """
    return bool(getattr(encoder, "head_hidden_size", encoder.num_features) != encoder.num_features)


def _state(model: Contrastive) -> dict[str, Tensor]:
    """Return the tensors of both towers by open_clip's names."""
    tensors = {f"visual.trunk.{key}": value for key, value in detached(model.encoder).items()}
    projection = model.image_projection.weight.detach().cpu().clone()
    if _has_own_projection(model.encoder):
        classifier = f"visual.trunk.{model.encoder.pretrained_cfg['classifier']}"
        tensors |= {f"{classifier}.weight": projection, f"{classifier}.bias": projection.new_zeros(len(projection))}
    else:
        tensors["visual.head.proj.weight"] = projection
    tensors |= {f"text.{key}": value for key, value in detached(model.text).items()}
    tensors["logit_scale"] = model.logit_scale.detach().cpu().reshape(()).clone()
    if model.logit_bias is not None:
        tensors["logit_bias"] = model.logit_bias.detach().cpu().reshape(()).clone()
    return tensors


@torch.no_grad()
def _largest_difference(run: Restored[Contrastive], folder: Path) -> float:
    """Measure the largest difference between open_clip's embeddings and the run's, relative to their largest number.

    Raises:
        ValueError: If the embeddings differ by more than rounding, or if scale or bias differ at all.
    """
    model, theirs = run.model.float(), _loaded(folder)
    images = torch.randn(_TRIED, 3, *run.images["size"], generator=torch.Generator().manual_seed(0))
    tokens, _ = model.tokenizer(_TRIED_TEXTS)
    pairs = {
        "images": (model.encode_image(images), theirs.encode_image(images, normalize=True)),
        "texts": (model.encode_text(tokens), theirs.encode_text(tokens, normalize=True)),
        "logit_scale": (model.logit_scale, theirs.logit_scale),
    }
    if model.logit_bias is not None:
        pairs["logit_bias"] = (model.logit_bias, theirs.logit_bias)
    found = {
        what: float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
        for what, (one, other) in pairs.items()
    }
    if wrong := {what: difference for what, difference in found.items() if not difference <= _TOLERANCE}:
        listed = ", ".join(f"{what} by {difference:.1e}" for what, difference in wrong.items())
        raise UserError(
            f"save_open_clip: open_clip computes other results than {run.path}: they differ in {listed} of "
            f"the largest number, and {_TOLERANCE:.0e} is allowed. Nothing was written; please report it, with "
            "config.yaml and the versions of open_clip and timm."
        )
    return max(found.values())


def _loaded(folder: Path) -> Any:
    try:
        return load_open_clip(folder).eval()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"save_open_clip: open_clip cannot build this model: {error} Nothing was written; write the image tower "
            "alone, with --format safetensors or timm."
        ) from error


def _note(run: Restored[Contrastive]) -> str:
    """Return a note for the user beside the line of code that reads the folder."""
    note = "after `import ssmpretrain, open_clip`; the tokenizer is open_clip.get_tokenizer of the same word"
    crop = run.images["crop_pct"]
    if crop == 1:
        return note
    return f"{note}; its images are whole, where the run's evaluation cut out the middle {crop:.1%} of a side"
