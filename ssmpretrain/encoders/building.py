"""Builder behind the entry points of our encoders in timm, and their timm configuration."""

from typing import Any, TypeVar

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_named, family_of
from ssmpretrain.encoders.features.pyramid import SimplePyramid
from ssmpretrain.encoders.weights.finite_check import check_finite

# Arguments of timm's encoders that `build` accepts, although our encoders have no such option.
TIMMS_OWN = ("dynamic_img_size", "dynamic_img_pad", "output_stride")
FEATURE_CLASSES = ("getter", "hook", "fx")
PYRAMID = "pyramid"

Encoder = TypeVar("Encoder", bound=nn.Module)


def build(model_class: type[Encoder], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Encoder:
    """Build an encoder as timm's entry points do, with the arguments that its registered name stands for.

    Args:
        model_class: Class of the encoder.
        variant: Registered name, which belongs to a registered family.
        pretrained: Whether to load the weights that the encoder's timm configuration names.
        kwargs: Further arguments of the encoder, of timm's builder, and of timm's encoders. `dynamic_img_size` has no
            effect, because our encoders accept images of any size. `feature_cls` may also be "pyramid", which gives a
            `SimplePyramid`.

    Returns:
        The encoder, or timm's wrapper of it if `kwargs` has `features_only`.

    Raises:
        ValueError: If the encoder does not support an option of timm's encoders.
    """
    family = family_named(variant)
    kwargs = {**family.sizes(variant), **kwargs}
    family.check_options(variant, kwargs)
    kwargs.pop("dynamic_img_size", None)
    if kwargs.pop("dynamic_img_pad", False):
        raise UserError(f"{variant}: images are not padded; got dynamic_img_pad=True. Pad or resize them before.")
    kind = kwargs.pop("feature_cls", PYRAMID if variant in family.pyramids else "getter")
    stride = family.stride(kwargs)
    if kind == PYRAMID and kwargs.get("features_only"):
        stride *= 2
    if (asked := kwargs.pop("output_stride", None)) not in (None, stride):
        raise UserError(
            f"{variant}: the last features have a stride of {stride} pixels, and no other; got output_stride={asked}. "
            "Leave it out."
        )
    kinds = (*FEATURE_CLASSES, PYRAMID) if family.gives_pyramid else FEATURE_CLASSES
    if isinstance(kind, str) and kind not in kinds:
        raise UserError(f"{variant}: feature_cls is one of {', '.join(kinds)}; got {kind!r}. Leave it out.")
    feature_cfg = {
        "out_indices": kwargs.pop("out_indices", 4 if kind == PYRAMID else family.out_indices),
        "feature_cls": SimplePyramid if kind == PYRAMID else kind,
    }
    return build_model_with_cfg(
        model_class, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=_fitted, **kwargs
    )


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize the position embedding in a state dict that timm has read to the encoder's image size.

    The grid of patches in the file is computed from the image size in the encoder's configuration. If this does not
    fit, a square grid is assumed.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    cfg: Any = model.pretrained_cfg
    check_finite("timm", state, f"the weights of {cfg['architecture']}")
    family = family_of(model)
    for built_with in ({**family.sizes(cfg["architecture"]), "img_size": cfg["input_size"][1:]}, None):
        if (adapted := family.adapt(state, model, built_with)).resized:
            return adapted.state
    return state  # timm reports shapes that do not fit


def image_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's configuration of an encoder for 224 x 224 images, normalised with ImageNet's mean and deviation.

    Args:
        kwargs: Entries that are added to the configuration or replace its defaults.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }
