import pytest

from ssmpretrain.encoders import create_encoder, list_encoders


def test_our_names_are_listed_and_filtered():
    assert list_encoders("vim_*_patch16_224") == [
        f"vim_{size}_patch16_224" for size in ("base", "large", "small", "tiny")
    ]
    assert "test_vim" in list_encoders()
    assert not list_encoders("vit_*")  # timm's own are timm's to list


def test_timms_encoders_are_built_too():
    assert create_encoder("vit_tiny_patch16_224", num_classes=3, img_size=32).num_classes == 3


def test_arguments_reach_the_encoder():
    model = create_encoder("test_vim", num_classes=0, img_size=(64, 32), class_token="double", d_state=4)
    assert (model.num_classes, model.patch_embed.grid_size, model.num_class_tokens) == (0, (4, 2), 2)
    assert model.layers[0].mixer.A_log.shape == (64, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vim_tny_patch16_224", {}, "got 'vim_tny_patch16_224'. Did you mean vim_tiny_patch16_224"),
        (
            "qqqq",
            {},
            "got 'qqqq'. Ours are arm_base_patch16_224, .*test_vim, .*test_vmamba, test_vmamba2, vim",
        ),
        ("test_vim", {"depht": 2}, "test_vim takes no argument 'depht'. Did you mean 'depth'?"),
        ("test_vim", {"zzzz": 2}, "takes no argument 'zzzz'. It takes img_size, "),
        ("vit_tiny_patch16_224", {"zzzz": 2}, "vit_tiny_patch16_224 takes no argument 'zzzz'"),
        ("test_vim", {"img_size": 100}, "Resize or crop its height from 100 to 96 or 112"),
    ],
)
def test_a_typo_is_answered_with_what_exists(name, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        create_encoder(name, **options)
