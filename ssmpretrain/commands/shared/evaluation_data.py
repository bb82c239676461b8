"""Images for the evaluation of an encoder: those that the command names, or those of its run."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from ssmpretrain.base import ranks
from ssmpretrain.base.environment import environment_number
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_config import read_config
from ssmpretrain.commands.shared import trusted_classes
from ssmpretrain.commands.shared.trusted_classes import import_class
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.evaluation.features import check_has_bank


class Images(Protocol):
    """Interface of a model with images: `where` starts error messages, `images` holds size and normalisation."""

    @property
    def where(self) -> str: ...

    @property
    def images(self) -> dict[str, Any]: ...


def add_arguments(parser: argparse.ArgumentParser, *splits: str) -> None:
    """Add the options that name images: one for each split, by default `--train` and `--val`."""
    data = parser.add_argument_group("data", "by default the data in the config.yaml of the run")
    for split in splits or ("train", "val"):
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
    trusted_classes.add_argument(data)


class EvaluationData:
    """Training and validation images for evaluation, in a fixed order, each image once over all ranks.

    Args:
        module: Data module that provides the images.
        where: Start of error messages, such as the name of a command.
        flags: Options that name other images, for messages.
    """

    def __init__(self, module: Any, where: str, flags: str) -> None:
        self.module, self.where, self.flags = module, where, flags
        check_has_bank(module, where, f"Name images with {flags}.")
        if environment_number("LOCAL_RANK", 0) == 0:
            module.prepare_data()
        ranks.gather(None)  # wait until the data are there
        module.setup("validate")

    def use_labels(self) -> None:
        """Tell the data module to use labels. An image with an unreadable label then counts as bad.

        Raises:
            ValueError: If several sources have different classes, or no label can be read.
        """
        if hasattr(self.module, "use_labels"):
            self.module.use_labels()

    def batches(self, split: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
        """Return batches of the split "train" or "val"; with `limit`, only that many images, evenly spread.

        Raises:
            ValueError: If there is no such split.
        """
        load = self.module.bank_dataloader if split == "train" else self.module.val_dataloader
        batches: Any = load(limit=limit)
        if isinstance(batches, list) and not batches:
            raise UserError(
                f"{self.where}: {type(self.module).__name__} has no validation images. Name some: {self.flags}."
            )
        return _with_progress(batches, split)

    def skipped(self, split: str) -> dict[str, int]:
        """Count the images of a split that no rank could use, by cause. Every rank must call this."""
        counts: dict[str, dict[str, int]] = {}
        if hasattr(self.module, "bad_samples"):
            found = self.module.bad_samples()
            counts = found.get("bank" if split == "train" and "bank" in found else split, {})
        total = Counter[str]()
        for part in ranks.gather({cause: sum(files.values()) for cause, files in counts.items()}):
            total.update(part)
        return dict(total)

    def describe(self, split: str) -> dict[str, Any]:
        """Describe the source of the images of a split, as plain data."""
        found = {"class": type(self.module).__name__, "split": split, "path": getattr(self.module, split, None)}
        if classes := getattr(self.module, "classes", None):
            found["classes"] = classes
        return found


def load_data(
    args: argparse.Namespace,
    encoder: Images,
    train: list[str] | None,
    val: list[str] | None,
    *,
    caption: list[str] | None = None,
    flags: str = "--train and --val",
) -> EvaluationData:
    """Load the images that the command names, or else those of the run of `args.checkpoint`.

    Args:
        args: Arguments of `add_arguments`, and `checkpoint`, `image_size` and `trust`.
        encoder: Model that the images are for.
        train, val: Paths of the images. A single one counts for both; without both, the data of the run are loaded.
        caption: Fields of the shards that hold captions; None reads only images.
        flags: Options that name images, for messages.

    Raises:
        ValueError: If neither the arguments nor a run name images.
    """
    options = {
        name: value
        for name in ("batch_size", "num_workers", "max_bad_fraction")
        if (value := getattr(args, name)) is not None
    }
    if train or val:
        named = _named(train, val, options | ({"caption": caption} if caption else {}), encoder)
        return EvaluationData(named, encoder.where, flags)
    if args.image_size is not None:
        options["image_size"] = args.image_size
    found = config_of_run(args.checkpoint, encoder.where, flags)
    if found is None:
        raise UserError(
            f"{encoder.where}: {args.checkpoint} belongs to no run, so no config.yaml names its data. "
            f"Name images with {flags}."
        )
    path, config = found
    try:
        module = _of_run(path, config, args.trust, options, encoder.where, flags)
        return EvaluationData(module, encoder.where, flags)
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError, AssertionError) as error:
        raise UserError(  # values of wrong types fail in many ways
            f"{encoder.where}: the data that {path} describes cannot be loaded ({type(error).__name__}: {error}). "
            f"Correct the file, or name images with {flags}."
        ) from error


def skipped_lines(split: str, skipped: Mapping[str, int]) -> list[str]:
    """Return lines that report the images that could not be used."""
    return [f"left out of {split}: {count:,} {cause}" for cause, count in skipped.items()]


def _named(train: list[str] | None, val: list[str] | None, options: dict[str, Any], encoder: Images) -> Any:
    from ssmpretrain.datamodules.open_images import open_images  # torchvision takes seconds to import

    images = encoder.images
    options = {
        "image_size": tuple(images["size"]),
        "mean": images["mean"],
        "std": images["std"],
        "eval_crop_ratio": images["crop_pct"],
        "interpolation": images["interpolation"],
        **options,
    }
    train, val = train or val, val or train  # one path counts for both, because data modules need training images
    assert train and val
    return open_images(train, val, **options)


def config_of_run(checkpoint: str, where: str, flags: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the configuration file of a checkpoint's run and its content; None if the checkpoint belongs to no run.

    Raises:
        ValueError: If the file is no configuration of a run.
    """
    path = weights_in(checkpoint)
    config = path.parent.parent / "config.yaml"
    if path.parent.name != "checkpoints" or not os.path.lexists(config):
        return None
    try:
        return config, read_config(config)
    except ValueError as error:
        raise UserError(f"{where}: {error} Name images with {flags}.") from error


def _of_run(
    path: Path, config: dict[str, Any], trusted: list[str], options: dict[str, Any], where: str, flags: str
) -> Any:
    """Build the data module of the run with the configuration file `path`; `options` override its own."""
    from lightning.pytorch import LightningDataModule

    data = config.get("data") or {"class_path": "nothing"}
    module = import_class(
        data["class_path"],
        LightningDataModule,
        room="ssmpretrain.datamodules",
        trusted=trusted,
        where=f"{where}: data in {path}",
        instead=f"Name images with {flags}",
    )
    arguments = {**(data.get("init_args") or {}), **(data.get("dict_kwargs") or {}), **options}
    hints = _hints(module)
    return module(**{name: _as_declared(hints.get(name), value) for name, value in arguments.items()})


def _hints(module: type) -> dict[str, Any]:
    """Return the types of the arguments of a class, also of those that it passes on to its base classes."""
    hints: dict[str, Any] = {}
    for cls in reversed(module.__mro__):
        with suppress(NameError):  # of a type that only type checkers import
            hints |= get_type_hints(cls.__init__) if "__init__" in vars(cls) else {}  # type: ignore[misc]
    return hints


def _as_declared(hint: Any, value: Any) -> Any:
    """Return plain data as the dataclass, or the list of dataclasses, that a type hint names, such as `Photometric`."""
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if isinstance(value, list):
        inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        return [_as_declared(inner, part) for part in value]
    kind: Any = next((kind for kind in kinds if is_dataclass(kind)), None)
    if kind is None or not isinstance(value, dict):
        return value
    hints = get_type_hints(kind)
    return kind(**{name: _as_declared(hints.get(name), part) for name, part in value.items()})


def _with_progress(batches: Any, split: str) -> Iterable[Mapping[str, Any]]:
    from tqdm import tqdm

    disable = None if ranks.rank() == 0 else True  # None: shown only in a terminal
    progress: Iterable[Mapping[str, Any]] = tqdm(batches, desc=f"encoding {split}", unit=" batches", disable=disable)
    return progress
