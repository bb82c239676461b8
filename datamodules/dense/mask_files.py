"""Pairs of image and mask in folders: found by a template, with everything that has no partner listed."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter

from ssmpretrain.base.errors import DataError, PathMissing
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.faults.bad_samples import too_many
from ssmpretrain.datamodules.files.folders import find_folder, look_around
from ssmpretrain.datamodules.files.image_files import describe_left_out, find_images, read_file

_FIELDS = {"folder", "stem"}
OTHER_ENDING = "images whose names do not end in"  # a reason, before the ending


@dataclass(frozen=True)
class MaskFolders:
    """Folders of the images and the masks of one split, and the rule by which they belong together.

    Args:
        images, masks: The folders.
        mask: Template of a mask below `masks`; see `Layout`.
        image_ending: Part of an image's stem that a mask does not share.
        listed: File that lists the stems of the images, one per line; None if all images are used.
    """

    images: Path
    masks: Path
    mask: str
    image_ending: str = ""
    listed: Path | None = None

    def mask_of(self, image: str) -> str:
        """Return the path of the mask of an image; both paths are relative, with "/"."""
        path = PurePosixPath(image)
        stem = path.stem.removesuffix(self.image_ending)
        return posixpath.normpath(self.mask.format(folder=path.parent, stem=stem))


@dataclass(frozen=True)
class MaskFiles:
    """Images with their masks, in sorted order.

    Args:
        folders: The folders that were searched.
        images: Paths of the images, relative to their folder, with "/".
        masks: Path of the mask of each image, relative to the folder of the masks, also where it does not exist.
        left_out: Relative paths that were skipped, by the reason.
    """

    folders: MaskFolders
    images: list[str]
    masks: list[str]
    left_out: Mapping[str, Sequence[str]]

    def describe_shared(self) -> str:
        """Return a sentence for the user if images share a mask, such as 0.jpg and 0.png; otherwise ""."""
        counts = Counter(self.masks)
        shared = {mask for mask, count in counts.items() if count > 1 and (self.folders.masks / mask).exists()}
        if not shared:
            return ""
        number, mask = sum(counts[mask] for mask in shared), min(shared)
        images = [image for image, other in zip(self.images, self.masks, strict=True) if other == mask]
        return (
            f"{number:,} images share their mask with another image, such as {shown(few(images, 3))}, whose mask is "
            f"{shown(str(self.folders.masks / mask))}; all are used. If they are not the same picture, tell them apart "
            "by image_ending or the template of the masks, or remove some."
        )


def check_template(mask: str, where: str) -> None:
    """Raise if a text is no template of a mask, such as "{folder}/{stem}_mask.png"."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(mask) if name is not None}
    except ValueError:
        fields = set()
    if "stem" not in fields or not fields <= _FIELDS or not mask.lower().endswith(".png"):
        raise DataError(
            f"{where}: mask is a template of a PNG file with {{stem}}, and {{folder}} for the folder of the image "
            f'below the images; got {mask!r}. Use "{{folder}}/{{stem}}_mask.png", say.'
        )


def find_masks(folders: MaskFolders, max_fraction: float, where: str, *, follow_links: bool = True) -> MaskFiles:
    """Find the images of a split and their masks.

    Masks that lie among the images are no images, and neither are files whose names lack `image_ending`. The suffix of
    a mask may be .png or .PNG.

    Args:
        folders: The folders.
        max_fraction: Fraction of the images that may lack a mask, as in `too_many`.
        where: Name of the data module and split, which opens every message.
        follow_links: Whether links that leave the folders are followed, as in `find_images`.

    Raises:
        FileNotFoundError: If a folder or the list does not exist.
        DataError: If there is no image or no mask, or too many images lack a mask.
    """
    find_folder(str(folders.masks), where=where)
    found = find_images(folders.images, where=where, follow_links=follow_links)
    found_masks = find_images(folders.masks, where=where, follow_links=follow_links)
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for files in (found, found_masks) if folders.images != folders.masks else (found,):
        for reason, paths in files.left_out.items():
            left_out[reason] += paths
    known = {_lowered(path): path for path in found_masks.paths}
    images = _images(folders, found.paths, known, left_out, where)
    expected = [folders.mask_of(path) for path in images]
    missing = [path for path, mask in zip(images, expected, strict=True) if _lowered(mask) not in known]
    if too_many(len(missing), len(images), max_fraction) or len(missing) == len(images):
        raise DataError(
            f"{where}: {len(missing):,} of {len(images):,} images have no mask, such as {shown(missing[0])}, whose "
            f"mask would be {shown(folders.mask_of(missing[0]))}; got {shown(few(list(known.values()), 3))} in "
            f"{folders.masks}. Correct the folders or the template of the masks, or add the masks."
        )
    if folders.listed is None:
        left_out["masks without an image"] = _orphans(folders, known, expected, images)
    masks = [known.get(_lowered(mask), mask) for mask in expected]
    return MaskFiles(folders, images, masks, {reason: paths for reason, paths in left_out.items() if paths})


def _images(
    folders: MaskFolders, paths: Sequence[str], known: Mapping[str, str], left_out: dict[str, list[str]], where: str
) -> list[str]:
    """Return the files that are images of the split, in sorted order; note what is left out.

    Args:
        folders: The folders.
        paths: All files with the suffix of an image below the folder of the images.
        known: Paths of the masks, by the same path with a suffix in lower case.
        left_out: Relative paths that are skipped, by the reason.
        where: Name of the data module and split, which opens every message.
    """
    below = posixpath.relpath(folders.masks.absolute(), folders.images.absolute())
    partners = {folders.mask_of(path) for path in paths}
    masks = {posixpath.normpath(posixpath.join(below, known.get(_lowered(mask), mask))) for mask in partners}
    images, ending = [path for path in paths if path not in masks], folders.image_ending
    others = [path for path in images if not PurePosixPath(path).stem.endswith(ending)]
    if others:
        left_out[f"{OTHER_ENDING} {ending}"] = others
        images = sorted(set(images) - set(others))
    if folders.listed is not None:
        images, left_out["names in the list without an image"] = _listed(folders.listed, images, where)
    if not images:
        reasons = "; ".join(describe_left_out({reason: names for reason, names in left_out.items() if names}))
        raise DataError(
            f"{where}: no image that can have a mask in {folders.images}: {reasons or 'all are masks'}. Correct the "
            "folders or the rule of the masks."
        )
    return images


def _listed(listed: Path, images: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Return the images whose stems a file lists, in sorted order, and the stems without an image."""
    try:
        lines = read_file(listed).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise PathMissing(f"{where}: no list of images {listed}; {look_around(listed)}. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: the list of images {listed} cannot be read ({error}). Check the file.") from error
    stems = dict.fromkeys(line.strip() for line in lines if line.strip())
    by_stem = {str(PurePosixPath(path).with_suffix("")): path for path in images}
    return sorted(by_stem[stem] for stem in stems if stem in by_stem), [stem for stem in stems if stem not in by_stem]


def _orphans(
    folders: MaskFolders, known: Mapping[str, str], expected: Sequence[str], images: Sequence[str]
) -> list[str]:
    """Return the files that have the name of a mask, and no image."""
    ending = folders.mask.rpartition("{stem}")[2].lower()
    wanted = {_lowered(mask) for mask in expected}
    own = set(images) if folders.images.absolute() == folders.masks.absolute() else set()
    return [
        path for key, path in known.items() if path.lower().endswith(ending) and key not in wanted and path not in own
    ]


def _lowered(path: str) -> str:
    """Return a path whose suffix is in lower case."""
    stem, dot, suffix = path.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"
