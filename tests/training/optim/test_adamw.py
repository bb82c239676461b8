"""Parameter groups and the learning-rate rule."""

import pytest
from torch import nn

from ssmpretrain.training.optim.adamw import AdamW, parameter_groups


class Decayless(nn.Linear):
    def no_weight_decay(self) -> set[str]:
        return {"weight"}


def make_module() -> nn.Module:
    return nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "scan": Decayless(4, 2)})


def test_learning_rate_is_per_256_images() -> None:
    assert AdamW(lr_per_256=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)


def test_biases_norms_and_listed_matrices_go_without_decay() -> None:
    with_decay, without = parameter_groups(make_module(), 0.05)
    assert with_decay["param_names"] == ["linear.weight"]
    assert with_decay["weight_decay"] == 0.05 and without["weight_decay"] == 0
    assert set(without["param_names"]) == {"linear.bias", "norm.weight", "norm.bias", "scan.weight", "scan.bias"}


def test_decay_all_makes_one_group() -> None:
    (group,) = parameter_groups(make_module(), 0.05, "all")
    assert len(group["params"]) == 6


def test_frozen_parameters_are_left_out() -> None:
    module = make_module().requires_grad_(False)
    module["linear"].weight.requires_grad_(True)
    optimizer = AdamW().build(module, global_batch=256)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    assert optimizer.param_groups[0]["lr"] == 1.5e-4


@pytest.mark.parametrize("bad", [{"lr_per_256": -1.0}, {"weight_decay": float("nan")}, {"betas": (0.9, 1.0)}])
def test_out_of_range_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="AdamW: " + next(iter(bad))):
        AdamW(**bad)


def test_an_encoder_keeps_its_decay_list_inside_an_objective() -> None:
    from ssmpretrain.objectives import MAE

    model = MAE("test_vim", decoder_embed_dim=32)
    decayed = parameter_groups(model, 0.05)[0]["param_names"]
    assert not [
        name for name in decayed if name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "D", "pos_embed", "cls_token")
    ]
    assert "encoder.layers.0.mixer.in_proj.weight" in decayed and "decoder.layers.0.mixer.in_proj.weight" in decayed
