"""Base class of families. A family describes one architecture to the rest of the package.

Code that loads, masks, pools or exports encoders asks the family of the encoder and contains no names of architectures.
To add an architecture, write one subclass and call `register_family`, in this package or outside of it; see
`examples/custom_encoder.py`.

    B images, K visible patches, D features
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.tapping import Tapping

# Arguments of timm that load other weights. A run may have started from such weights.
OTHER_WEIGHTS = ("pretrained", "checkpoint_path")
_MAX_LISTED = 5
# Remedy in error messages about the patch size.
FINER_GRID = "for more tokens of the same patches a larger img_size or, of a Vim, a smaller stride"


@dataclass(frozen=True)
class Adapted:
    """Tensors of a file after they were adapted to the shapes of an encoder.

    Attributes:
        state: Tensors by the names of the encoder's state dict.
        resized: Names of the tensors that were resampled to another shape.
        copied: Names of the tensors that are copies of other tensors.
        notes: One line of text per change, for the report of `load_encoder`.
        lacking: Names of the encoder's tensors that a file of this kind never has. They keep their initial values.
        tap_norms: Weights and biases of norms of maps that a dense head read, by the number of the tap. They are parts
            of a `TappedEncoder`, not of the encoder.
    """

    state: dict[str, Tensor]
    resized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacking: frozenset[str] = frozenset()
    tap_norms: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class Family(Tapping):
    """Base class of all families.

    Every attribute and method has a default. The defaults fit an encoder that does not support the feature. The base
    class `Tapping` reads maps for dense tasks; its defaults serve every encoder with timm's interface.

    Attributes:
        title: Name of the architecture, used in error messages.
        names_like: Shell patterns of its registered names, used in error messages.
        is_timms: Whether timm itself registers the encoders.
        classes: Classes of the encoders. Their subclasses belong to the family too.
        variants: Registered names, each with its arguments. All other arguments have the defaults of the class.
        pyramids: Registered names whose `features_only` gives a `SimplePyramid`, each with the registered name of the
            same encoder without a pyramid.
        depth: Name of the argument that gives the number of blocks.
        implied: Arguments that belong to every registered name, in addition to those in `variants`.
        untraceable: For an argument, the values that give tensors of the same names and shapes.
        strangers: Patterns of tensor names that belong to similar architectures, each with an explanation for the error
            message.
        hides_patches: Whether the family implements `forward_visible`, which masked autoencoders need.
        has_stem: Whether `stem` finds the patch embedding, which masked images with mask tokens need.
        official_code: GitHub repository whose code reads `official_state`; empty if there is none.
        official_flag: Command-line option of that repository that loads weights without a head.
        resizes_positions: Whether `adapt` resizes the position embedding. If False, timm's `set_input_size` resizes it
            after the weights are loaded.
        pooled_norm: Prefix or prefixes of the norm of pooled features, and of a projection before it. They may start
            fresh together with a fresh head.
        out_indices: Default of `out_indices` for `features_only`.
        gives_pyramid: Whether `features_only` accepts `feature_cls="pyramid"`.
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
    pooled_norm: ClassVar[str | tuple[str, ...]] = "fc_norm."
    out_indices: ClassVar[int | tuple[int, ...]] = 3
    gives_pyramid: ClassVar[bool] = False

    # Names and arguments

    @property
    def names(self) -> tuple[str, ...]:
        """Return all registered names, including those of pyramids."""
        return (*self.variants, *self.pyramids)

    def sizes(self, name: str) -> Mapping[str, Any]:
        """Return the arguments that belong to a registered name; empty for a name of another family."""
        return self.variants.get(self.pyramids.get(name, name), {})

    def stride(self, args: Mapping[str, Any]) -> int:
        """Return the stride in pixels of the last map of an encoder that is built with `args`."""
        return int(args.get("stride") or args.get("patch_size", 16))

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Raise a ValueError if `timm.create_model` got an option that this encoder does not support.

        Args:
            name: Registered name.
            options: Arguments of the name and arguments that the caller passed.
        """

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state dict belongs to this family, even if some of its tensors are missing.

        Args:
            state: Tensors by the names in the file.
        """
        return False

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Translate names and layouts of older versions of the official code to those of its newest version.

        Args:
            state: Tensors after `from_official`.
            path: Path of the file, used in error messages.
            asked: Arguments of the encoder that the caller passed.

        Returns:
            The tensors under their current names.

        Raises:
            ValueError: If the tensors belong to a similar architecture that this family does not support.
        """
        return dict(state)

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments that follow from names and shapes of tensors; None if too few tensors are left.

        Args:
            state: Tensors by their current names.
        """
        return None

    def variant_name(self, args: Mapping[str, Any]) -> str | None:
        """Return the first registered name whose arguments all agree with `args`; None if there is none."""
        alike = (name for name, sizes in self.variants.items() if all(args.get(key) == sizes[key] for key in sizes))
        return next(alike, None)

    def describe(self, args: Mapping[str, Any]) -> str:
        """Return a text with the registered name, if there is one, and the sizes, for error messages."""
        sizes = ", ".join(f"{key} {value}" for key, value in args.items())
        return f"{self.variant_name(args) or f'{self.title} of no registered size'} ({sizes})"

    def layout(
        self, path: Path, state: Mapping[str, Tensor], found: Mapping[str, Any], asked: Mapping[str, Any], named: bool
    ) -> dict[str, Any]:
        """Return the stride and the image size that the position embedding in a file was trained with.

        They depend on the tensors and on the arguments that the caller passed.

        Args:
            path: Path of the file, used in error messages.
            state: Tensors by their current names.
            found: Result of `recognise`.
            asked: Arguments of the registered name and arguments that the caller passed.
            named: Whether the caller passed a registered name.

        Raises:
            ValueError: If the tensors and the arguments contradict each other.
        """
        return {}

    def args_under_name(self, name: str, other: str, args: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments that build the encoder of a file under another registered name; None if they cannot.

        Args:
            name: Registered name that the caller passed.
            other: Registered name in the file.
            args: Arguments in the file.
        """
        return None

    def match(
        self, path: Path, state: Mapping[str, Tensor], name: str | None, asked: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        """Find the registered name and the arguments of the encoder that the tensors belong to.

        Args:
            path: Path of the file, used in error messages.
            state: Tensors by the names in the file.
            name: Registered name of the encoder; None if the caller does not know it.
            asked: Arguments of the encoder that the caller passed.

        Returns:
            The tensors by the names of the encoder's state dict, the registered name, and the arguments.

        Raises:
            ValueError: If too few tensors are left to recognise the encoder, or if the caller's name or arguments
                contradict them.
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
        """Raise a ValueError if a tensor belongs to a similar architecture (see `strangers`); the error names it."""
        for pattern, meaning in self.strangers.items():
            if key := next((key for key in state if re.search(pattern, key)), None):
                raise UserError(
                    f"load_encoder: {path.name} is not a {self.title} of this package: {key} means {meaning}."
                )

    def _refuse_cut_off(self, path: Path, found: Mapping[str, Any]) -> None:
        """Raise an error for a registered width with an unregistered depth: the file has probably lost blocks."""
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
        """Adapt tensors to the shapes of an encoder: resize positions, copy directions.

        Args:
            state: Tensors by their current names.
            encoder: The encoder that will get the tensors. It is not changed here.
            built_with: Arguments of the encoder that the tensors come from; None if they are unknown.
        """
        return Adapted(dict(state))

    def compilable_blocks(self, encoder: Any) -> list[nn.Module]:
        """Return the blocks that `torch.compile` can compile one by one: every forward pass calls them as modules.

        They take and return tensors whose shapes depend only on the shape of the images and the mask ratio. Empty if
        the encoder has other blocks.
        """
        return []

    # Masked images

    def patch_side(self, encoder: Any) -> int | None:
        """Return the side in pixels of a patch that can be hidden; None if the encoder cannot hide patches.

        Raises:
            ValueError: If the patches of the encoder overlap.
        """
        return None

    def forward_visible(self, encoder: Any, images: Tensor, keep: Tensor) -> Tensor:
        """Compute `encoder.forward_features` from the visible patches only.

        Args:
            encoder: An encoder for which `patch_side` returns a number.
            images: Images, (B, C, H, W). H and W are multiples of `patch_side`.
            keep: Raster indices of the visible patches, (B, K), int64, ascending, because a scan depends on the order.

        Returns:
            Features after the final norm, with the axes that `encoder.forward_head` reads.
        """
        self._lacks("forward_visible", encoder)

    def class_and_patches(self, encoder: Any, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split the result of `forward_visible` into class features and patch features.

        Returns:
            Class features, (B, D), or None if the encoder has no class token; and patch features, (B, K, D).
        """
        self._lacks("class_and_patches", encoder)

    def pool_visible(self, encoder: Any, images: Tensor, keep: Tensor) -> Tensor:
        """Return the pooled features (B, D) of the visible patches. The arguments are those of `forward_visible`.

        If all patches are visible, the result equals `encoder(images)` of an encoder without a head.
        """
        pooled: Tensor = encoder.forward_head(self.forward_visible(encoder, images, keep), pre_logits=True)
        return pooled

    def init_for_masking(self, encoder: Any) -> None:
        """Set the initial values of the published masked autoencoders, in place. The default changes nothing."""

    def fix_positions(self, encoder: Any) -> None:
        """Replace the position embedding by the fixed sine-cosine table, in place. Rows of class tokens are zeros."""

    def decoder_args(self, encoder: Any) -> dict[str, Any]:
        """Return the arguments of `VimBlocks` that give the decoder of a masked autoencoder the encoder's mixer."""
        return {}

    def decoder(self, encoder: Any, depth: int, width: int) -> nn.Module | None:
        """Return the decoder of a masked autoencoder, tokens (B, L, width) to (B, L, width), of the encoder's blocks.

        None means Vim's blocks, with `decoder_args`.

        Args:
            encoder: The encoder.
            depth: Number of blocks.
            width: Channels of the decoder.
        """
        return None

    def stem(self, encoder: Any) -> tuple[nn.Module, Format] | None:
        """Return the module that turns pixels into the input of the first block, and the axes of its output.

        The encoder calls this module once per forward pass. The axes are NLC (one token per position of the last map),
        NHWC or NCHW. The result is None if mask tokens cannot replace the output of the module.

        Raises:
            ValueError: If the patches overlap.
        """
        return None

    # Pooled features

    def has_class_token(self, encoder: Any) -> bool:
        """Return whether the encoder has a class token."""
        return getattr(encoder, "cls_token", None) is not None

    def class_vector(self, tokens: Tensor) -> Tensor:
        """Return the class features (B, D) from all tokens other than patches, (B, n, D).

        The default takes the first token, as timm's encoders do.
        """
        return tokens[:, 0]

    def pooled_norm_of(self, encoder: Any) -> tuple[nn.Module, Format] | None:
        """Return the norm that the encoder applies to pooled features instead of to its last map, and its axes.

        The axes are NHWC for a norm of the last axis, NCHW for a norm of the second. The result is None if there is no
        such norm. The default takes `fc_norm`, as timm's encoders call it.
        """
        norm = getattr(encoder, "fc_norm", None)
        return None if norm is None or isinstance(norm, nn.Identity) else (norm, Format.NHWC)

    # Export for the official code

    def not_official(self, encoder: Any) -> str | None:
        """Return a text that says why the official code cannot read an encoder; None if it can."""
        return None

    def official_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of an encoder with the names and shapes of the official code."""
        return dict(state)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with the names and shapes of the encoder: the inverse of `official_state`.

        Tensors that already have these names and shapes do not change.
        """
        return dict(state)

    def _lacks(self, method: str, encoder: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}.{method}: not defined for {type(encoder).__name__}")


def unrecognised(path: Path, state: Mapping[str, Tensor], titles: str) -> UserError:
    """Return the error for a file whose encoder is not recognised.

    Args:
        path: Path of the file.
        state: Its tensors.
        titles: Names of the families that were tried.
    """
    some = ", ".join(list(state)[:_MAX_LISTED])
    return UserError(
        f"load_encoder: {path} is no {titles} checkpoint, or too little of one to recognise; "
        f"its {len(state)} tensors start with {some}. Pass `name` to see what it lacks."
    )


def take_visible(tokens: Tensor, keep: Tensor) -> Tensor:
    """Return the visible patches, (B, K, D), of all patches.

    Args:
        tokens: All patches, (B, L, D).
        keep: Raster indices of the visible patches, (B, K), int64.
    """
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
