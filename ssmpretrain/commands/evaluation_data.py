"""Images to evaluate an encoder on: those that a person names, or those of its run."""

from __future__ import annotations

import argparse
import importlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ssmpretrain.commands.frozen_encoder import FrozenEncoder
from ssmpretrain.encoders.checkpoint_file import weights_in
from ssmpretrain.training import ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides the images."""
    data = parser.add_argument_group("data", "by default the data of the run, as its config.yaml says")
    for split in ("train", "val"):
        data.add_argument(
            f"--{split}",
            nargs="+",
            metavar="PATH",
            help="an image folder with one sub-folder per class, or shards: tar files, folders of them, globs or "
            "brace patterns",
        )
    data.add_argument("--batch-size", type=int, help="images per batch (default: the run's, or 64)")
    data.add_argument("--num-workers", type=int, help="processes that decode images (default: the run's, or 2)")
    data.add_argument(
        "--max-bad-fraction", type=float, help="stop when more of the images are unusable (default: the run's, or 0.01)"
    )


class EvaluationData:
    """Training and validation images as evaluation sees them, in a fixed order, each once over all ranks.

    Args:
        module: A data module.
        encoder: What they are for.
    """

    def __init__(self, module: Any, encoder: FrozenEncoder) -> None:
        self.module, self.where = module, encoder.where
        if not hasattr(module, "bank_dataloader"):
            raise ValueError(
                f"{self.where}: a data module has bank_dataloader(limit), as those of ssmpretrain.datamodules have; "
                f"{type(module).__name__} has not. Name images with --train and --val."
            )
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            module.prepare_data()
        ranks.gather(None)  # until the data is there
        module.setup("validate")

    def batches(self, split: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
        """Batches of the split "train" or "val"; `limit` takes this many of its images, evenly spread.

        Raises:
            ValueError: If there is no such split.
        """
        load = self.module.bank_dataloader if split == "train" else self.module.val_dataloader
        batches: Any = load(limit=limit)
        if isinstance(batches, list) and not batches:
            raise ValueError(f"{self.where}: {type(self.module).__name__} has no validation images. Name some: --val.")
        return _with_progress(batches, split)

    def skipped(self, split: str) -> dict[str, int]:
        """Images of a split that no rank could use, counted by cause; every rank must ask."""
        counts: dict[str, dict[str, int]] = {}
        if hasattr(self.module, "bad_samples"):
            found = self.module.bad_samples()
            counts = found.get("bank" if split == "train" and "bank" in found else split, {})
        total = Counter[str]()
        for part in ranks.gather({cause: sum(files.values()) for cause, files in counts.items()}):
            total.update(part)
        return dict(total)

    def describe(self, split: str) -> dict[str, Any]:
        """Where the images of a split come from, as JSON holds it."""
        found = {"class": type(self.module).__name__, "split": split, "path": getattr(self.module, split, None)}
        if classes := getattr(self.module, "classes", None):
            found["classes"] = classes
        return found


def load_data(args: argparse.Namespace, encoder: FrozenEncoder) -> EvaluationData:
    """The data that the arguments of `add_arguments` name.

    Raises:
        ValueError: If neither they nor a run do.
    """
    options = {
        name: value
        for name in ("batch_size", "num_workers", "max_bad_fraction")
        if (value := getattr(args, name)) is not None
    }
    if args.train or args.val:
        return EvaluationData(_named(args.train, args.val, options, encoder), encoder)
    if args.image_size is not None:
        options["image_size"] = args.image_size
    return EvaluationData(_of_run(args.checkpoint, options, encoder.where), encoder)


def skipped_lines(split: str, skipped: Mapping[str, int]) -> list[str]:
    """What to tell the user of images that could not be used."""
    return [f"left out of {split}: {count:,} {cause}" for cause, count in skipped.items()]


def _named(train: list[str] | None, val: list[str] | None, options: dict[str, Any], encoder: FrozenEncoder) -> Any:
    from ssmpretrain.datamodules.images_in import images_in  # torchvision takes seconds to import

    images = encoder.images
    options = {
        "image_size": tuple(images["size"]),
        "mean": images["mean"],
        "std": images["std"],
        "eval_crop_ratio": images["crop_pct"],
        "interpolation": images["interpolation"],
        **options,
    }
    train, val = train or val, val or train  # one alone stands for both: data modules want training images
    assert train and val
    return images_in(train, val, **options)


def _of_run(checkpoint: str, options: dict[str, Any], where: str) -> Any:
    """The data module of the run that a checkpoint belongs to."""
    path = weights_in(checkpoint)
    config = path.parent.parent / "config.yaml"
    if path.parent.name != "checkpoints" or not config.is_file():
        raise ValueError(
            f"{where}: {checkpoint} is of no run, whose config.yaml would say on what data. "
            "Name images with --train and --val."
        )
    data = (yaml.safe_load(config.read_text()) or {}).get("data") or {}
    return _data_module(str(data.get("class_path")), f"{where}: the data of {config}")(
        **{**(data.get("init_args") or {}), **(data.get("dict_kwargs") or {}), **options}
    )


def _data_module(class_path: str, what: str) -> Any:
    from lightning.pytorch import LightningDataModule

    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        cls = None
    if isinstance(cls, type) and issubclass(cls, LightningDataModule):
        return cls
    raise ValueError(
        f"{what} is of a LightningDataModule that can be imported; got {class_path}. "
        "Name images with --train and --val."
    )


def _with_progress(batches: Any, split: str) -> Iterable[Mapping[str, Any]]:
    from tqdm import tqdm

    disable = None if ranks.rank() == 0 else True  # None: where nobody is watching
    progress: Iterable[Mapping[str, Any]] = tqdm(batches, desc=f"encoding {split}", unit=" batches", disable=disable)
    return progress
