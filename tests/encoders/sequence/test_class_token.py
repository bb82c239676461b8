import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.sequence.class_token import class_positions, insert_class_tokens, remove_class_tokens


@pytest.mark.parametrize(
    ("kind", "num_patches", "expected"),
    [
        ("middle", 196, (98,)),
        ("middle", 729, (364,)),
        ("middle", 5, (2,)),
        ("middle", 1, (0,)),
        ("head", 7, (0,)),
        ("double", 7, (0, 8)),
        ("none", 7, ()),
    ],
)
def test_positions_are_the_published_ones(kind, num_patches, expected):
    assert class_positions(kind, num_patches) == expected


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"one of middle, head, double, none, registers; got 'tail'"):
        class_positions("tail", 4)


def test_insertion_keeps_the_patches_in_order():
    patches = torch.arange(5.0).view(1, 5, 1)
    tokens = -torch.ones(1, 1, 1)
    assert insert_class_tokens(patches, tokens, "middle").flatten().tolist() == [0, 1, -1, 2, 3, 4]
    both = torch.tensor([-1.0, -2.0]).view(1, 2, 1)
    assert insert_class_tokens(patches, both, "double").flatten().tolist() == [-1, 0, 1, 2, 3, 4, -2]


@pytest.mark.parametrize("kind", ["middle", "head", "double", "none"])
def test_removal_undoes_insertion(kind):
    for num_patches in (1, 2, 7):
        patches = torch.randn(2, num_patches, 3)
        tokens = torch.randn(2, len(class_positions(kind, 0)), 3)
        back = remove_class_tokens(insert_class_tokens(patches, tokens, kind), kind)
        assert torch.equal(back[0], patches), num_patches
        assert torch.equal(back[1], tokens), num_patches


@pytest.mark.parametrize("kind", ["middle", "head", "double"])
def test_a_class_token_gets_its_row_of_the_position_embedding(kind):
    encoder = ssmpretrain.create_encoder("test_vim", class_token=kind, img_size=32)
    patches = torch.zeros(1, 4, encoder.embed_dim)
    torch.nn.init.normal_(encoder.pos_embed)
    positions = class_positions(kind, encoder.patch_embed.num_patches)
    learned = torch.cat([getattr(encoder, name) for name in encoder._class_token_names()], dim=1)
    _, tokens = remove_class_tokens(encoder._with_class_tokens(patches), kind)
    torch.testing.assert_close(tokens, learned + encoder.pos_embed[:, list(positions)])
