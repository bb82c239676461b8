"""The tensors of a contrastive head belong to its objective, under the names that every checkpoint has."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from pairs import tiny
from torch import nn

from ssmpretrain.objectives import CLIP, MAECLIP

OWN: dict[type[Any], set[str]] = {CLIP: set(), MAECLIP: {"mask_token", "decoder", "decoder_embed", "decoder_pred"}}


@pytest.mark.parametrize("cls", [CLIP, MAECLIP])
def test_names_in_a_checkpoint_have_no_prefix_and_no_tensor_has_two(cls: type[Any]) -> None:
    model = tiny(cls, loss="siglip", **({"decoder_embed_dim": 32} if cls is MAECLIP else {}))
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"encoder", "text", "image_projection", "logit_scale", "logit_bias"} | OWN[cls]
    tensors = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    assert len(tensors) == len(set(tensors))


def test_the_head_computes_with_whatever_tensor_takes_the_place_of_its_own() -> None:
    model = tiny(CLIP)
    copied = deepcopy(model)
    model._parameters["logit_scale"] = nn.Parameter(torch.ones(1))  # as FSDP2 and functional_call do it
    copied.logit_scale.data.fill_(2.0)
    right = torch.eye(2, 4)
    for one, scale in ((model, 1.0), (copied, 2.0)):
        expected = torch.nn.functional.cross_entropy(torch.eye(2) * torch.tensor(scale).exp(), torch.arange(2))
        assert one.contrastive.loss(right, right).item() == pytest.approx(expected.item())
