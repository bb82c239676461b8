"""The base class of objectives that compare views: sizes and batches that it refuses."""

from typing import Any

import pytest
import torch
from dino_run import ManyViews, fit, tiny_dino

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives import DINO, LeJEPA


@pytest.mark.parametrize(("data", "message"), [
    (ManyViews(32, 20), "multiples of 8 pixels.*got 20. Use 16 or 24"),
    (ManyViews(30, 16), "multiples of 8 pixels.*got 30"),
])  # fmt: skip
def test_views_that_patches_do_not_cover_are_refused_before_the_first_step(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(tiny_dino(encoder_args={"patch_size": 8, "depth": 1}), data)


@pytest.mark.parametrize(("batch", "message"), [
    ({"image": torch.zeros(2, 3, 32, 32)}, "a dictionary with views and num_global; got entries image. Set data.views"),
    ([torch.zeros(2, 3, 32, 32)], "got a list"),
    ({"views": [torch.zeros(2, 1, 3, 32, 32)], "num_global": 1}, "two views or more, to compare them; got 1"),
])  # fmt: skip
def test_batches_without_views_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_dino().views_of(batch)


def test_heads_read_the_width_of_the_global_feature_also_where_the_encoder_names_another() -> None:
    dino = DINO(encoder="test_efficientnet", num_prototypes=4, head_hidden_dim=8, head_bottleneck_dim=4)
    lejepa = LeJEPA(encoder="test_efficientnet", projector_hidden=[8], projector_dim=4)
    for objective, head in ((dino, dino.head), (lejepa, lejepa.projector)):
        features = objective.eval()(torch.randn(2, 3, 64, 64))
        assert features.shape[1] != objective.encoder.num_features
        assert head.eval()(features).shape == (2, 4)
