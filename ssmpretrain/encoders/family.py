"""Families of encoders: one object for everything in which an architecture differs from the others.

Code that reads, fills, masks, pools or exports encoders asks the encoder's `Family` and names no architecture. A new
architecture is one subclass and one call of `register_family`, in this package or outside of it; see
`examples/custom_encoder.py`.

    B images, K visible patches, D features
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError

# Arguments with which timm fetches other weights; a run may have begun with them.
OTHER_WEIGHTS = ("pretrained", "checkpoint_path")
_MAX_LISTED = 5
# What to do for want of smaller patches.
FINER_GRID = "for more tokens of the same patches a larger img_size or, of a Vim, a smaller stride"


@dataclass(frozen=True)
class Adapted:
    """Tensors of a file, brought to the shapes of an encoder.

    Attributes:
        state: The tensors by the encoder's names.
        resized: Names of the tensors that were resampled to another shape.
        copied: Names of the tensors that are copies of others.
        notes: One line for each change that a report mentions.
        lacking: Names of the encoder's tensors that such a file does not have, and that stay at their initial values.
    """

    state: dict[str, Tensor]
    resized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacking: frozenset[str] = frozenset()


class Family:
    """Base class of all families.

    Every method has a default, which serves an encoder of timm that does without the ability in question.

    Attributes:
        title: Name of the architecture, for messages.
        names_like: Shell patterns of its registered names, for messages.
        is_timms: Whether timm itself registers the encoders.
        classes: Classes of the encoders. A subclass of one of them belongs to the family too.
        variants: Registered names, each with the arguments that tell it apart from the class's defaults.
        pyramids: Registered names whose `features_only` gives a `SimplePyramid`, each with the name of the same encoder
            without it.
        depth: Name of the argument that counts blocks.
        implied: Arguments that every registered name stands for, beside its own.
        untraceable: Values of an argument that leave the same tensors.
        strangers: Patterns of tensor names that no encoder of this family has, each with the meaning of such a name.
        hides_patches: Whether `forward_visible` works, so that masked autoencoders can leave patches out.
        has_stem: Whether `stem` finds the patch embedding, so that mask tokens can take its output's place.
        official_code: Repository whose code reads `official_state`; empty for none.
        official_flag: Option with which its main program reads weights without a head.
        resizes_positions: Whether `adapt` resizes the position embedding. The others of timm's encoders are resized
            after they are filled.
        pooled_norm: Prefix of the norm of pooled features, which starts fresh where a fresh head does.
        out_indices: Features that `features_only` gives by default.
        gives_pyramid: Whether `features_only` takes `feature_cls="pyramid"`.
    """

    title: ClassVar[str] = "encoder"
    names_like: ClassVar[tuple[str, ...]] = ()
    is_timms: ClassVar[bool] = False
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    pyramids: ClassVar[Mapping[str, str]] = {}
    depth: ClassVar[str] = "depth"
    implied: ClassVar[Mapping[str, Any]] = {}
    untraceable: ClassVar[Mapping[str, set[str]]] = {}
    strangers: ClassVar[Mapping[str, str]] = {}
    hides_patches: ClassVar[bool] = False
    has_stem: ClassVar[bool] = False
    official_code: ClassVar[str] = ""
    official_flag: ClassVar[str] = ""
    resizes_positions: ClassVar[bool] = False
    pooled_norm: ClassVar[str] = "fc_norm."
    out_indices: ClassVar[int | tuple[int, ...]] = 3
    gives_pyramid: ClassVar[bool] = False

    # Names and arguments

    @property
    def names(self) -> tuple[str, ...]:
        """Return all registered names, pyramids included."""
        return (*self.variants, *self.pyramids)

    def sizes(self, name: str) -> Mapping[str, Any]:
        """Return the arguments that a registered name stands for; none for a name of another family."""
        return self.variants.get(self.pyramids.get(name, name), {})

    def stride(self, args: Mapping[str, Any]) -> int:
        """Return the pixels from one position of the last map to the next, for an encoder built with `args`."""
        return int(args.get("stride") or args.get("patch_size", 16))

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Raise a ValueError if `timm.create_model` got an option that this encoder cannot serve.

        Args:
            name: Registered name.
            options: Its sizes and all that the caller asked for.
        """

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state dict has tensors of this family. A truncated file still looks like its family."""
        return False

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Translate names and layouts that are older than those of the official code today.

        Args:
            state: Tensors, after `from_official`.
            path: The file, for messages.
            asked: Arguments of the encoder that the caller named.

        Raises:
            ValueError: If the tensors belong to a similar architecture that this family does not cover.
        """
        return dict(state)

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments that names and shapes of tensors imply; None if too few tensors are there to tell."""
        return None

    def variant_name(self, args: Mapping[str, Any]) -> str | None:
        """Return the registered name of the encoder with these arguments; None if there is none."""
        alike = (name for name, sizes in self.variants.items() if all(args.get(key) == sizes[key] for key in sizes))
        return next(alike, None)

    def describe(self, args: Mapping[str, Any]) -> str:
        """Return the registered name, if there is one, and the sizes, for messages."""
        sizes = ", ".join(f"{key} {value}" for key, value in args.items())
        return f"{self.variant_name(args) or f'{self.title} of no registered size'} ({sizes})"

    def layout(
        self, path: Path, state: Mapping[str, Tensor], found: Mapping[str, Any], asked: Mapping[str, Any], named: bool
    ) -> dict[str, Any]:
        """Return the arguments that depend on both the tensors and the request: stride and image size of a position
        embedding.

        Args:
            path: The file, for messages.
            state: Tensors under current names.
            found: Answer of `recognise`.
            asked: Arguments that the name stands for and the caller asked for.
            named: Whether the caller named the encoder.

        Raises:
            ValueError: If tensors and request contradict each other.
        """
        return {}

    def args_under_name(self, name: str, other: str, args: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what builds the encoder `other` with `args` under another registered name; None if it cannot.

        Args:
            name: Name that the caller asked for.
            other: Name in the file.
            args: Arguments in the file.
        """
        return None

    def match(
        self, path: Path, state: Mapping[str, Tensor], name: str | None, asked: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        """Find the name and the arguments of the encoder that tensors belong to.

        Args:
            path: The file, for messages.
            state: Tensors by the names in the file.
            name: Registered name if the caller knows it.
            asked: Arguments of the encoder that the caller named.

        Returns:
            The tensors under the encoder's own names, its registered name, its arguments.

        Raises:
            ValueError: If too few tensors are there to tell, or the request contradicts them.
        """
        self.refuse_strangers(path, state)
        state = self.current_names(self.from_official(state), path, asked)
        found = self.recognise(state)
        if found is None:
            if name is not None:
                return state, name, dict(asked)  # filling the encoder will list what the file lacks
            raise unrecognised(path, state, self.title)
        if name is None and self.depth not in asked:
            self._refuse_cut_off(path, found)
        base = name or self.variant_name(found) or next(iter(self.variants))
        wanted = dict(asked) if name is None else {**self.sizes(name), **self.implied, **asked}
        self._refuse_contradictions(path, found, wanted, base)
        layout = self.layout(path, state, found, wanted, named=name is not None)
        return state, base, {**found, **layout, **asked}

    def refuse_strangers(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError that names the architecture if a tensor belongs to a similar one (`strangers`)."""
        for pattern, meaning in self.strangers.items():
            if key := next((key for key in state if re.search(pattern, key)), None):
                raise UserError(
                    f"load_encoder: {path.name} is not a {self.title} of this package: {key} means {meaning}."
                )

    def _refuse_cut_off(self, path: Path, found: Mapping[str, Any]) -> None:
        """Refuse a registered width at an unknown depth: more likely, a file lost its last blocks."""
        same_but_depth = [
            name
            for name, sizes in self.variants.items()
            if all(found.get(key, value) == value for key, value in sizes.items() if key not in (self.depth, "stride"))
        ]
        depth = found.get(self.depth)
        if same_but_depth and depth not in [self.variants[name].get(self.depth) for name in same_but_depth]:
            whole = self.variants[same_but_depth[0]].get(self.depth)
            raise UserError(
                f"load_encoder: {path} holds {depth} blocks of {found['embed_dim']} channels; "
                f"{same_but_depth[0]} has {whole}. If blocks were left out on purpose, pass {self.depth}={depth}."
            )

    def _refuse_contradictions(self, path: Path, found: Mapping[str, Any], asked: Mapping[str, Any], base: str) -> None:
        for key, value in found.items():
            if key in ("stride", "img_size", "in_chans") or key not in asked or _plain(asked[key]) == value:
                continue
            if {_plain(asked[key]), value} <= self.untraceable.get(key, set()):
                continue
            name = self.variant_name(found)
            remedy = f"Pass name={name!r} or leave `name` out" if name and name != base else f"Pass {key}={value!r}"
            remedy += f", or {FINER_GRID}" if key == "patch_size" else ""
            raise UserError(
                f"load_encoder: {path} holds {self.describe(found)} with {key}={value!r}; "
                f"{base} with {key}={asked[key]!r} was asked for. {remedy}."
            )

    def adapt(self, state: Mapping[str, Tensor], encoder: Any, built_with: Mapping[str, Any] | None) -> Adapted:
        """Bring tensors to the shapes of an encoder: resize positions, copy directions.

        Args:
            state: Tensors under current names.
            encoder: The encoder to fill; it is left as it is.
            built_with: Arguments with which the encoder of the tensors was built; None if nobody says.
        """
        return Adapted(dict(state))

    # Masked images

    def patch_side(self, encoder: Any) -> int | None:
        """Return the pixels along the side of a patch that can be left out; None if the encoder needs all of them.

        Raises:
            ValueError: If its patches overlap.
        """
        return None

    def forward_visible(self, encoder: Any, images: Tensor, keep: Tensor) -> Tensor:
        """Compute `encoder.forward_features` from the visible patches alone.

        Args:
            encoder: One with a `patch_side`.
            images: (B, C, H, W), sides multiples of the patch's side.
            keep: Raster indices of the visible patches, (B, K), int64, ascending: a scan reads in order.

        Returns:
            Features after the final norm, in the form that `encoder.forward_head` reads.
        """
        self._lacks("forward_visible", encoder)

    def class_and_patches(self, encoder: Any, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split features of `forward_visible` into class features (B, D), None without a class token, and patches
        (B, K, D)."""
        self._lacks("class_and_patches", encoder)

    def pool_visible(self, encoder: Any, images: Tensor, keep: Tensor) -> Tensor:
        """Return the pooled features (B, D) of the visible patches alone; arguments as for `forward_visible`.

        With all patches visible they are those of `encoder(images)` for an encoder without a head.
        """
        pooled: Tensor = encoder.forward_head(self.forward_visible(encoder, images, keep), pre_logits=True)
        return pooled

    def init_for_masking(self, encoder: Any) -> None:
        """Draw the initial values that the published masked autoencoders use, in place. The default keeps the
        encoder's own."""

    def fix_positions(self, encoder: Any) -> None:
        """Replace the position embedding by the fixed sine-cosine table, zero for class tokens; in place."""

    def decoder_args(self, encoder: Any) -> dict[str, Any]:
        """Return the arguments of `VimBlocks` that give a masked autoencoder's decoder the encoder's kind of mixer."""
        return {}

    def stem(self, encoder: Any) -> tuple[nn.Module, Format] | None:
        """Return the module that turns pixels into what the first block reads, and the axes of its output.

        The module is called once an image. The axes are NLC (one token for each position of the last map), NHWC or
        NCHW. None if mask tokens cannot take the place of its output.

        Raises:
            ValueError: If its patches overlap.
        """
        return None

    # Pooled features

    def has_class_token(self, encoder: Any) -> bool:
        """Return whether the encoder has a class token."""
        return getattr(encoder, "cls_token", None) is not None

    def class_vector(self, tokens: Tensor) -> Tensor:
        """Return the class features (B, D) among the tokens that are no patches, (B, n, D): timm puts them first."""
        return tokens[:, 0]

    # Export for the official code

    def not_official(self, encoder: Any) -> str | None:
        """Name the part of an encoder for which the official code has no counterpart; None if it reads all of it."""
        return None

    def official_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an encoder's state dict under the names and shapes of the official code."""
        return dict(state)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `official_state`; a state dict under the encoder's own names comes back as it is."""
        return dict(state)

    def _lacks(self, method: str, encoder: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}.{method}: not defined for {type(encoder).__name__}")


def unrecognised(path: Path, state: Mapping[str, Tensor], titles: str) -> UserError:
    """Return the error of a file whose encoder cannot be told; `titles` are the families that were tried."""
    some = ", ".join(list(state)[:_MAX_LISTED])
    return UserError(
        f"load_encoder: {path} is no {titles} checkpoint, or too little of one to recognise; "
        f"its {len(state)} tensors start with {some}. Pass `name` to see what it lacks."
    )


def take_visible(tokens: Tensor, keep: Tensor) -> Tensor:
    """Take the visible patches out of all patches: (B, L, D) and raster indices (B, K) to (B, K, D)."""
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
