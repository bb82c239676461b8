"""Masks of iBOT: how many places are hidden, in which shape, and that a seed fixes them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.joint_embedding.masks import Drawn, Masks

GRIDS = [(14, 14), (7, 7), (3, 3), (3, 5), (1, 2)]


def draw(settings: Masks, N: int = 16, grid: tuple[int, int] = (14, 14), seed: int = 0) -> Drawn:
    return settings.draw(N, grid, torch.Generator().manual_seed(seed))


def counts(drawn: Drawn) -> list[int]:
    found: list[int] = drawn.hidden.flatten(1).sum(dim=1).tolist()
    return found


@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("grid", GRIDS)
def test_half_of_the_views_have_shares_that_are_spread_evenly(grid: tuple[int, int], shape: Any) -> None:
    L = grid[0] * grid[1]
    shares = [0.1 + 0.4 * k / 8 for k in range(1, 9)]
    expected = sorted([0] * 8 + [min(max(int(L * share + 1e-4), 1), L - 1) for share in shares])
    for seed in range(4):
        assert sorted(counts(draw(Masks(shape=shape), 16, grid, seed))) == expected


def test_dinov3_s_counts_of_14_by_14_places() -> None:
    assert sorted(counts(draw(Masks(), 8)))[4:] == [39, 58, 78, 98]


def test_an_odd_number_of_views_and_a_single_one_are_masked_too() -> None:
    assert [sum(one > 0 for one in counts(draw(Masks(), N))) for N in (1, 2, 3, 5)] == [1, 1, 1, 2]


def test_the_rule_of_ibot_draws_a_share_for_each_view() -> None:
    found = torch.tensor(counts(draw(Masks(counts="drawn"), 2000))).float() / 196
    masked = found[found > 0]
    assert len(masked) / 2000 == pytest.approx(0.5, abs=0.04)
    assert masked.min() >= 0.095 and masked.max() <= 0.5
    assert masked.mean().item() == pytest.approx(0.3, abs=0.02) and masked.std().item() == pytest.approx(
        0.115, abs=0.01
    )


def test_places_and_weights_belong_to_the_hidden_places() -> None:
    drawn = draw(Masks())
    assert torch.equal(drawn.places, drawn.hidden.flatten().nonzero()[:, 0])
    of_view = torch.tensor(counts(drawn))
    assert torch.allclose(drawn.weight, 1 / (16 * of_view[drawn.places // 196].float()))
    assert drawn.weight.sum().item() == pytest.approx(0.5)  # half of the views have a mask
    nothing = Drawn.none(3, (2, 2))
    assert not nothing.hidden.any() and nothing.hidden.shape == (3, 2, 2) and len(nothing.places) == 0


def neighbours(hidden: Tensor) -> float:
    """Share of the pairs of neighbours, from left to right, of a hidden place that are hidden too."""
    return float((hidden[:, :, 1:] & hidden[:, :, :-1]).sum() / hidden[:, :, :-1].sum())


def test_blocks_hang_together_and_random_places_do_not() -> None:
    few = {"ratio": (0.2, 0.2), "fraction": 1.0}
    blocks, places = (draw(Masks(shape=shape, min_block=9, **few), 64).hidden for shape in ("block", "random"))
    assert neighbours(blocks) > 0.6 and neighbours(places) < 0.3


def test_a_single_block_is_a_rectangle_within_the_aspect() -> None:
    settings = Masks(fraction=1.0, ratio=(0.25, 0.25), min_block=49, aspect=(1.0, 1.0))
    whole = [one for one in draw(settings, 32).hidden if is_rectangle(one)]
    assert whole and all(one.any(0).sum() == one.any(1).sum() == 7 for one in whole)


def is_rectangle(mask: Tensor) -> bool:
    return bool((mask == (mask.any(0, keepdim=True) & mask.any(1, keepdim=True))).all())


def test_masks_reach_every_place() -> None:
    hidden = draw(Masks(), 400, (7, 7)).hidden.float().mean(dim=0)
    assert hidden.min() > 0.02 and hidden.max() < 0.35  # 0.15 on average; few blocks reach the corners


def test_the_global_seed_fixes_masks_and_the_generator_fixes_them_alone() -> None:
    torch.manual_seed(1)
    first = Masks().draw(8, (7, 7))
    other = Masks().draw(8, (7, 7))
    torch.manual_seed(1)
    assert torch.equal(Masks().draw(8, (7, 7)).hidden, first.hidden) and not torch.equal(first.hidden, other.hidden)
    assert torch.equal(draw(Masks(), seed=3).hidden, draw(Masks(), seed=3).hidden)


@pytest.mark.parametrize(("changes", "message"), [
    ({"fraction": 0.0}, "fraction is a share of the global views in .0, 1.; got 0.0"),
    ({"ratio": (0.5, 0.1)}, "ratio is two shares"),
    ({"ratio": (0.5, 1.0)}, "ratio is two shares"),
    ({"aspect": (0.0, 1.0)}, "aspect is two ratios"),
    ({"min_block": 0}, "min_block is at least 1 place; got 0"),
    ({"counts": "even"}, "counts is spread or drawn; got 'even'"),
    ({"shape": "square"}, "shape is block or random; got 'square'"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Masks(**changes)


def test_views_of_a_single_place_are_refused() -> None:
    with pytest.raises(UserError, match=r"two places or more on the encoder's last map.*got 1"):
        Masks().draw(4, (1, 1))
