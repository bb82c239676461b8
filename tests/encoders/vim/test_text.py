"""The text tower of one-directional Mamba blocks."""

import pytest
import torch
from torch import Tensor

from ssmpretrain.encoders.vim.text import MambaText
from ssmpretrain.training.optim.adamw import parameter_groups

END = 99


def tower() -> MambaText:
    torch.manual_seed(0)
    return MambaText(12, END + 1, width=16, layers=3, output_dim=8)


def texts() -> Tensor:
    """Three texts of 4, 12 and 2 tokens."""
    tokens = torch.randint(1, END, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((4, 12, 2)):
        tokens[row, length - 1] = END
        tokens[row, length:] = 0
    return tokens


@torch.no_grad()
def test_what_follows_the_end_token_changes_nothing() -> None:
    model, tokens = tower(), texts()
    other = tokens.clone()
    other[0, 4:], other[2, 2:] = torch.arange(1, 9), END  # a second end token too
    assert torch.equal(model(tokens), model(other))
    assert model(tokens).shape == (3, 8)


@torch.no_grad()
def test_every_token_before_the_end_and_their_order_count() -> None:
    model, tokens = tower(), texts()
    for place in range(11):
        changed = tokens.clone()
        changed[1, place] = 50 if tokens[1, place] != 50 else 51
        assert (model(changed)[1] - model(tokens)[1]).abs().max() > 1e-6, place
    swapped = tokens.clone()
    swapped[1, [3, 4]] = tokens[1, [4, 3]]
    assert (model(swapped)[1] - model(tokens)[1]).abs().max() > 1e-6


@torch.no_grad()
def test_a_text_has_its_embedding_whatever_the_others_of_the_batch_are() -> None:
    model, tokens = tower(), texts()
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=1e-5, atol=1e-6)
    assert model(tokens[:0]).shape == (0, 8)


def test_tokens_that_no_text_has_are_not_computed() -> None:
    model, seen = tower(), []
    model.blocks.register_forward_hook(lambda module, given, result: seen.append(tuple(given[0].shape)))
    model(texts()[[0, 2]])
    assert seen == [(2, 4, 16)]


def test_texts_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 12 tokens; got 13"):
        tower()(torch.zeros(1, 13, dtype=torch.int64))


def test_checkpointing_changes_no_gradient() -> None:
    model, tokens = tower(), texts()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_weight_decay_spares_the_state_space() -> None:
    model = tower()
    spared = {
        name for group in parameter_groups(model, 0.1) if not group["weight_decay"] for name in group["param_names"]
    }
    assert model.no_weight_decay() <= spared
    assert {"blocks.layers.0.mixer.A_log", "blocks.layers.2.mixer.D"} <= spared
    assert not {"token_embedding.weight", "text_projection.weight"} & spared
