"""Impossible sizes are refused before any model is built, which would take all memory."""

from collections.abc import Callable

import pytest

from ssmpretrain.encoders import create_encoder
from ssmpretrain.objectives import ARM, CLIP, MAE, Finetune
from ssmpretrain.objectives.contrastive.text_tower import TextTower

HUGE = 100_000_000


@pytest.mark.parametrize(
    "build",
    (
        lambda: MAE("test_vim", decoder_embed_dim=HUGE),
        lambda: ARM("test_arm", decoder_embed_dim=HUGE, decoder_num_heads=1),
        lambda: CLIP("test_vim", embed_dim=HUGE),
        lambda: TextTower(width=HUGE),
        lambda: TextTower(layers=HUGE),
        lambda: Finetune("test_vim", num_classes=HUGE),
    ),
)
def test_an_objective_says_so(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r" at most [\d,]+; got 100,000,000\."):
        build()


@pytest.mark.parametrize(
    ("name", "option"),
    [("test_vim", option) for option in ("embed_dim", "d_state", "d_conv", "expand", "in_chans", "img_size")]
    + [("test_vmamba", option) for option in ("embed_dim", "d_state", "dt_rank", "ssm_ratio", "mlp_ratio", "in_chans")]
    + [("test_vmamba2", option) for option in ("embed_dim", "d_state", "head_dim", "ssm_ratio", "mlp_ratio")]
    + [("test_arm", option) for option in ("embed_dim", "d_state", "patch_size")],
)
def test_an_encoder_says_so(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}.* is at most 16,384; got [\d,.]+"):
        create_encoder(name, **{option: HUGE})
