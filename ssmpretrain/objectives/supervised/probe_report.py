"""The report of a linear probe: accuracies of its heads, and everything that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

NORMS = {
    "batch": "BatchNorm1d(affine=False, eps=1e-6): of each device's batch in training, running after",
    "layer": "LayerNorm with weights, eps=1e-5: one for each head, trained with it",
    "none": "none",
}
ATTENTIVE = "attentive_1"  # name of the sweep of attentive heads
_NORMS_IN_SHORT = {"batch": "batch norm without affine", "layer": "layer norm", "none": "no norm"}
_OF_EVALUATION = ("image_size", "interpolation", "eval_crop_ratio", "mean", "std")
_OF_TRAINING = (
    *_OF_EVALUATION, "crop_scale", "horizontal_flip", "auto_augment", "color_jitter", "photometric", "random_erasing",
    "repeats",
)  # fmt: skip


def training_images(data: Any) -> dict[str, Any]:
    """Describe the preparation of the images that heads are trained on, from a data module."""
    return {"class": type(data).__name__, "images": data.num_samples("train"), **_named(data, _OF_TRAINING)}


def validation_images(data: Any, seen: int) -> dict[str, Any]:
    """Describe the preparation of the validation images, from a data module, and their number `seen`."""
    return {"class": type(data).__name__, "images": seen, **_named(data, _OF_EVALUATION)}


def _named(data: Any, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(data, name) for name in names if hasattr(data, name)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def probe_table(
    heads: Sequence[dict[str, Any]], hits: Sequence[Sequence[int]], protocol: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of `probe.json`: the best head, the settings that all heads share, and every head.

    Args:
        heads: Description of each head.
        hits: For each head, the number of images whose class comes first, and among the first five.
        protocol: Settings that all heads share. `protocol["validation"]["images"]` is the number of images.
    """
    seen, batch = protocol["validation"]["images"], protocol.get("batch")
    rows = [
        {
            **head,
            "peak_lr": batch and head["lr_per_256"] * batch / 256,
            "top1": top1 / seen,
            "top5": top5 / seen,
        }
        for head, (top1, top5) in zip(heads, hits, strict=True)
    ]
    best = max(rows, key=lambda row: (row["top1"], row["top5"]))
    return {"best": best, "protocol": protocol, "heads": rows}


def best_in_a_sentence(table: dict[str, Any]) -> str:
    """Describe the best head of a `probe_table` in one sentence, with everything that its accuracy depends on."""
    best, protocol = table["best"], table["protocol"]
    blocks = "block" if best["last_blocks"] == 1 else f"{best['last_blocks']} blocks"
    if protocol["read"] == "mixer":
        blocks += " (outputs of their mixers)"
    heads = len(table["heads"])
    chosen = "the only head" if heads == 1 else f"the best of {heads} heads on these images"
    kind = f" ({protocol['weights']} weights)" if protocol.get("weights") else ""
    weights = f"from {protocol['init_from']}{kind}" if protocol["init_from"] else "with fresh weights"
    return (
        f"linear probe: top-1 {best['top1']:.2%}, top-5 {best['top5']:.2%} of {protocol['validation']['images']:,} "
        f"images with {best['pooling']} pooling of the last {blocks}, {_training(best, protocol)}; "
        f"{protocol['encoder']} {weights}; {chosen}"
    )


def _training(best: dict[str, Any], protocol: dict[str, Any]) -> str:
    if "batch" not in protocol:
        return "a head that is not trained"
    images = protocol["training"]
    settings = ", ".join(f"{name} {value}" for name, value in images.items() if name in ("image_size", "crop_scale"))
    taken, steps = protocol["steps_taken"], protocol["steps"]
    length = f"{protocol['epochs']:.3g} epochs" if taken == steps else f"{taken:,} of {steps:,} steps"
    decay = protocol["optimizer"]["weight_decay"] if best["kind"] != ATTENTIVE else 0
    decayed = f", weight decay {decay:g}" if decay else ""
    norm = _NORMS_IN_SHORT[best["normalisation"]]
    return (
        f"{norm} and {best['optimizer']} at lr_per_256 {best['lr_per_256']:g}{decayed} "
        f"(peak lr {best['peak_lr']:.3g} at batch {protocol['batch']}) for {length} of "
        f"{images['images']:,} images ({settings})"
    )
