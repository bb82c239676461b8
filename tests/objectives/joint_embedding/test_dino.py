"""DINO and iBOT: the loss of a step by hand, who sees which mask, centres, the frozen last layer, runs."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dino_run import ManyViews, fit, tiny_dino
from lightning.pytorch import Callback
from torch import Tensor, nn

from ssmpretrain import load_encoder
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.objectives import DINO
from ssmpretrain.objectives.joint_embedding import Gram, Masks, dino
from ssmpretrain.objectives.joint_embedding.masks import Drawn
from ssmpretrain.objectives.restore import restore
from ssmpretrain.training.optim.adamw import parameter_groups
from ssmpretrain.training.optim.ramps import Ramp

SWIN = {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("test_vim", {"img_size": 64, "depth": 2}),
    "vmamba": ("test_vmamba", {}),
    "vmamba2": ("test_vmamba2", {}),
    "mambaout": ("test_mambaout", {}),
    "convnext": ("test_convnext", {}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "vit": ("test_vit", {"img_size": 64, "depth": 2}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
VIT: tuple[str, dict[str, Any]] = ("test_vit", {"img_size": 64, "depth": 1})


class Steps(Callback):
    """Keeps loss, gradients, masks and the state before each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({k: p.grad.clone() for k, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# A step of a ViT, worked by hand in float64


def vit(encoder: Any, images: Tensor, hidden: Tensor | None, token: Tensor | None) -> tuple[Tensor, Tensor]:
    """The class feature and the patches of timm's ViT, from its parts."""
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if hidden is not None and token is not None:
        x = torch.where(hidden.flatten(1).unsqueeze(-1), token[0], x)
    prefix, pos = encoder.num_prefix_tokens, encoder.pos_embed
    side = round(x.shape[1] ** 0.5)
    full = round((pos.shape[1] - 1) ** 0.5)
    grid = pos[:, 1:].view(1, full, full, -1).permute(0, 3, 1, 2)
    if side != full:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1) + pos[:, :1], x + grid.flatten(2).transpose(1, 2)], dim=1)
    for block in encoder.blocks:
        x = block(x)
    x = encoder.norm(x)
    return x[:, 0], x[:, prefix:]


def head_by_hand(head: Any, x: Tensor) -> Tensor:
    x = head.mlp(x)
    w = head.last_layer.weight
    return (x / x.norm(dim=-1, keepdim=True)) @ (w / w.norm(dim=-1, keepdim=True)).T


def targets_by_hand(logits: Tensor, centre: Tensor | None) -> Tensor:
    if centre is not None:
        return ((logits - centre) / 0.04).softmax(dim=-1)
    q = (logits / 0.04).exp()
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def step_by_hand(model: DINO, batch: dict[str, Any], masks: Drawn) -> Tensor:
    """The loss with all its terms, view by view and image by image."""
    globals_, locals_ = (views.double() for views in batch["views"])
    B, hidden = len(globals_), masks.hidden.view(-1, 2, *masks.hidden.shape[1:])
    student: dict[int, Tensor] = {}
    features, patches, taught, taught_patches = [], [], [], []
    for t in range(2):
        vector, tokens = vit(model.encoder, globals_[:, t], hidden[:, t], model.mask_token)
        student[t] = head_by_hand(model.head, vector)
        features.append(vector)
        patches.append(head_by_hand(model.head.of_patches, tokens))
        vector, tokens = vit(model.teacher.encoder, globals_[:, t], None, None)
        taught.append(head_by_hand(model.teacher.head, vector))
        taught_patches.append(head_by_hand(model.teacher.head.of_patches, tokens))
    for number in range(locals_.shape[1]):
        student[2 + number] = head_by_hand(model.head, vit(model.encoder, locals_[:, number], None, None)[0])
    targets = targets_by_hand(torch.cat(taught), model.centre).view(2, B, -1).detach()
    dino = torch.stack([
        -(targets[t, b] * (student[s][b] / 0.1).log_softmax(0)).sum()
        for t in range(2) for s in student for b in range(B) if s != t
    ]).mean()  # fmt: skip
    masked = torch.cat([taught_patches[t][hidden[:, t].flatten(1)] for t in range(2)])
    targets = iter(targets_by_hand(masked, model.patch_centre).detach())
    ibot = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        for b in range(B):
            places = hidden[b, t].flatten().nonzero()[:, 0]
            terms = [-(next(targets) * (patches[t][b, i] / 0.1).log_softmax(0)).sum() for i in places]
            ibot = ibot + (torch.stack(terms).mean() if terms else 0)
    koleo = torch.zeros((), dtype=torch.float64)
    for x in features:
        x = x / x.norm(dim=-1, keepdim=True)
        far = torch.cdist(x, x) + 9 * torch.eye(B)
        koleo = koleo - (far.amin(dim=1) + 1e-8).log().mean()
    return dino + 0.7 * ibot / (2 * B) + 0.1 * koleo


@pytest.mark.parametrize("assign", ["centre", "sinkhorn"])
@pytest.mark.parametrize("patch_prototypes", [None, 12])
def test_loss_and_all_gradients_of_a_step_are_those_worked_by_hand_in_float64(
    assign: Any, patch_prototypes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dino(*VIT, assign=assign, ibot=0.7, koleo=0.1, patch_prototypes=patch_prototypes)
    for centre in (model.centre, model.patch_centre):
        if centre is not None:
            nn.init.normal_(centre, std=0.1)
    for parameter in model.teacher.parameters():  # another one than the student
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    drawn: list[Drawn] = []
    draw = Masks.draw
    monkeypatch.setattr(Masks, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    truth, steps, data = copy.deepcopy(model).double(), Steps(), ManyViews(64, 32, count=1)
    fit(model, data, steps)
    expected = step_by_hand(truth, data.batch(), drawn[0])
    expected.backward()
    assert steps.logged[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None}
    assert steps.gradients[0].keys() == theirs.keys() and not any(name.startswith("teacher") for name in theirs)
    scale = max(float(value.norm()) for value in theirs.values())
    assert max(float((steps.gradients[0][name] - value).norm()) for name, value in theirs.items()) < 2e-5 * scale


# Masks


@every_family
def test_no_hidden_pixel_changes_what_the_student_computes(family: str) -> None:
    model = tiny_dino(*FAMILIES[family], ibot=1.0).eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    side = model.encoder.feature_info[-1]["reduction"]
    hidden = Masks(fraction=1.0).draw(4, (64 // side, 64 // side)).hidden
    pixels = hidden.unsqueeze(1).repeat_interleave(side, 2).repeat_interleave(side, 3)
    with torch.no_grad():
        before = model._encode(images, hidden)
        after = model._encode(images.masked_fill(pixels, torch.nan), hidden)
        other = model._encode(torch.where(pixels, images, images + 1), hidden)
    assert torch.equal(before.vector, after.vector) and torch.equal(before.map, after.map)
    assert not torch.equal(before.vector, other.vector)


@pytest.mark.parametrize("local", [32, 16])
def test_only_global_views_of_the_student_are_masked_and_each_size_is_encoded_once(
    local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passes = tiny_dino(ibot=1.0), []
    masked, plain = dino.encode_masked, encode

    def note(module: nn.Module, images: Tensor, *args: Tensor) -> Any:
        who = "teacher" if module is model.teacher.encoder else "student"
        passes.append((who, tuple(images.shape), args[0].flatten(1).sum(1) if args else None))
        return masked(module, images, *args) if args else plain(module, images)

    for module in ("dino.encode_masked", "dino.encode", "joint_embedding.encode", "teacher.encode"):
        monkeypatch.setattr(f"ssmpretrain.objectives.joint_embedding.{module}", note)
    fit(model, ManyViews(32, local, count=1))
    of_size = [(20, 3, 32, 32)] if local == 32 else [(8, 3, 32, 32), (12, 3, 16, 16)]
    assert [one[:2] for one in passes] == [("teacher", (8, 3, 32, 32)), *(("student", shape) for shape in of_size)]
    counts = passes[1][2]
    assert counts is not None and passes[0][2] is None and passes[-1][2] is (None if local == 16 else counts)
    of_view = counts.view(4, -1)
    assert (of_view[:, :2] > 0).sum() == 4 and not of_view[:, 2:].any()  # half of the eight global views


def test_masks_begin_with_their_epoch_and_no_parameter_is_ever_without_a_gradient() -> None:
    model, steps = tiny_dino(ibot=1.0, ibot_from_epoch=1, patch_prototypes=8), Steps()
    fit(model, ManyViews(), steps, max_epochs=2)
    assert [one["train/ibot_loss"] == 0 for one in steps.logged] == [True, True, False, False]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(one.keys() == names for one in steps.gradients)
    assert not steps.gradients[1]["mask_token"].any() and steps.gradients[2]["mask_token"].any()


def test_the_patch_temperature_begins_to_move_with_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_dino(ibot=1.0, ibot_from_epoch=1), []
    softmax = dino.centred_softmax
    monkeypatch.setattr(dino, "centred_softmax", lambda *args: seen.append(round(args[2], 4)) or softmax(*args))
    fit(model, ManyViews(), max_epochs=3)
    assert seen[::2] == [0.04, 0.055, 0.07, 0.07, 0.07, 0.07]
    assert seen[1::2] == [0.04, 0.04, 0.04, 0.055, 0.07, 0.07]


# Every encoder


@every_family
def test_a_step_reaches_every_parameter_of_every_encoder(family: str) -> None:
    model, steps = tiny_dino(*FAMILIES[family], ibot=1.0), Steps()
    fit(model, ManyViews(64, 32, batch_size=2, count=1), steps)
    lacking = {name for name, p in model.named_parameters() if p.requires_grad} - steps.gradients[0].keys()
    assert lacking == set()


# Centres


@pytest.mark.parametrize("accumulate", [1, 2])
def test_centres_move_once_a_step_by_the_mean_of_the_teachers_logits(accumulate: int) -> None:
    model, data = tiny_dino(ibot=1.0, centre_momentum=0.8), ManyViews(count=accumulate)
    teacher = copy.deepcopy(model.teacher)
    fit(model, data, accumulate_grad_batches=accumulate)
    images = torch.cat([data.batch(number)["views"][0] for number in range(accumulate)]).flatten(0, 1)
    with torch.no_grad():
        vector, maps = teacher(images)
        patches = maps.flatten(2).transpose(1, 2).flatten(0, 1)
        for centre, features in ((model.centre, vector), (model.patch_centre, patches)):
            assert centre is not None
            assert torch.allclose(centre, 0.2 * teacher.head(features).mean(dim=0), atol=1e-6)


def test_logits_that_are_not_finite_leave_the_centre() -> None:
    model = tiny_dino()
    assert model.centre is not None
    nn.init.normal_(model.centre)
    before = model.centre.clone()
    model._move(model.centre, torch.full_like(before, torch.nan))
    assert torch.equal(model.centre, before)


def test_sinkhorn_has_no_centre() -> None:
    assert not any("centre" in name for name in tiny_dino(assign="sinkhorn", ibot=1.0).state_dict())


# The last layer, weight decay, Gram anchoring


def test_the_last_layers_stay_as_they_are_in_the_first_epoch() -> None:
    model, steps = tiny_dino(freeze_last_layer_epochs=1, ibot=1.0, patch_prototypes=8, last_layer="scaled"), Steps()
    fit(model, ManyViews(), steps, max_epochs=2)
    last = [name for name in steps.before[0] if "last_layer" in name and not name.startswith("teacher")]
    assert len(last) == 4
    for name in last:
        kept = [torch.equal(steps.before[0][name], one[name]) for one in steps.before[1:]]
        assert kept == [True, True, False], name  # after one, two and three steps; two are an epoch


def test_mask_token_and_state_space_parameters_have_no_weight_decay_and_layers_have_their_rates() -> None:
    model = tiny_dino(ibot=1.0, layer_decay=0.5)
    groups = parameter_groups(model, 0.1)
    spared = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    assert {"mask_token", "encoder.cls_token", "encoder.pos_embed", "encoder.layers.0.mixer.A_log"} <= spared
    assert "head.last_layer.weight" not in spared
    groups = model.build_optimizer(256).param_groups
    rate = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rate["head.mlp.0.weight"] == 0.32 and rate["encoder.cls_token"] == 0.32 * 0.5**2


def test_gram_anchoring_begins_at_its_step_with_a_snapshot_of_the_teacher() -> None:
    gram = Gram(weight=3.0, first_step=1, refresh_steps=2, max_refreshes=1)
    model, steps = tiny_dino(gram=gram, momentum=Ramp(0.5, 0.5)), Steps()
    fit(model, ManyViews(count=5), steps)
    assert ["train/gram_loss" in one for one in steps.logged] == [False, True, True, True, True]
    assert steps.logged[1]["train/loss"] == pytest.approx(
        steps.logged[1]["train/dino_loss"] + 3 * steps.logged[1]["train/gram_loss"], rel=1e-5
    )
    norm = "encoder.norm_f.weight"
    snapshot, teacher = ([one[f"{part}.{norm}"] for one in steps.before] for part in ("gram_teacher", "teacher"))
    final = model.state_dict()[f"gram_teacher.{norm}"]
    assert torch.equal(snapshot[2], teacher[1]) and torch.equal(snapshot[3], teacher[1])
    assert torch.equal(snapshot[4], teacher[3]) and torch.equal(final, teacher[3])


# Precision


def test_a_step_in_bfloat16_has_the_losses_of_float32_and_float32_statistics() -> None:
    logged = []
    for precision in ("32-true", "bf16-mixed"):
        model, steps = tiny_dino(ibot=1.0, koleo=0.1), Steps()
        fit(model, ManyViews(count=1), steps, precision=precision)
        assert model.centre is not None and model.centre.dtype == torch.float32
        logged.append(steps.logged[0])
    for name in ("train/dino_loss", "train/ibot_loss", "train/teacher_entropy"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=0.05)


# Runs


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ibot": 1.0, "gram": Gram(first_step=1), "freeze_last_layer_epochs": 1}
    settings["encoder_args"] = {"depth": 2, "patch_size": 8, "drop_path_rate": 0.5}
    whole = tiny_dino(**settings)

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "step.ckpt")

    fit(whole, ManyViews(), Save(), max_epochs=2)
    torch.manual_seed(99)
    again = tiny_dino(**settings)
    fit(again, ManyViews(), resume=tmp_path / "step.ckpt", max_epochs=2)
    expected = whole.state_dict()
    assert {"centre", "patch_centre", "mask_token", "gram_teacher.encoder.norm_f.weight"} <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_the_teacher_s_feature_is_evaluated_loaded_and_restored(tmp_path: Path) -> None:
    model = tiny_dino(encoder_args={"depth": 2, "patch_size": 8}, ibot=0.5, patch_prototypes=8, momentum=Ramp(0.5, 0.5))
    trainer = fit(model, ManyViews())
    assert tuple(model.teacher.encoder.patch_embed.img_size) == (32, 32)  # rebuilt for the data, with the student
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        feature = model(images)
        assert torch.equal(feature, encode(model.teacher.encoder, images).vector)
        assert not torch.equal(feature, encode(model.encoder, images).vector)
        loaded = load_encoder(tmp_path / "last.ckpt").eval()
        assert torch.equal(encode(loaded, images).vector, feature)
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        restored = restore(content, tmp_path / "last.ckpt", DINO)
        assert restored is not None and torch.equal(restored.model(images), feature)
    assert restored.model.hparams == model.hparams
    begun = tiny_dino(encoder=None, init_from=str(tmp_path / "last.ckpt"))  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(begun.eval()(images), feature)


def test_steps_on_one_batch_lower_the_loss_to_a_teacher_that_stays() -> None:
    class OneBatch(ManyViews):
        def batch(self, number: int = 0) -> dict[str, Any]:
            return super().batch()

    model, steps = tiny_dino(momentum=Ramp(1.0, 1.0), assign="sinkhorn"), Steps()
    fit(model, OneBatch(count=8), steps)
    assert steps.logged[-1]["train/kl"] < 0.8 * steps.logged[0]["train/kl"]


# Messages


@pytest.mark.parametrize(("changes", "message"), [
    ({"assign": "mean"}, "assign is centre or sinkhorn; got 'mean'"),
    ({"student_temperature": 0.0}, "student_temperature is finite and above 0; got 0.0"),
    ({"teacher_temperature": Ramp(0.0, 0.07)}, "teacher_temperature is above 0; got 0 to 0.07"),
    ({"patch_teacher_temperature": Ramp(-1, 0.07)}, "patch_teacher_temperature is above 0"),
    ({"momentum": Ramp(0.9, 1.1)}, "momentum is in .0, 1.; got 0.9 to 1.1"),
    ({"centre_momentum": 1.0}, "centre_momentum is in .0, 1.; got 1.0"),
    ({"layer_decay": 0.0}, "layer_decay is in .0, 1.; got 0.0"),
    ({"ibot": -1.0}, "ibot is finite and at least 0; got -1.0"),
    ({"koleo": float("nan")}, "koleo is finite and at least 0; got nan"),
    ({"encoder": "test_resnet", "encoder_args": {}, "ibot": 1.0}, "DINO: the mask token .*'test_resnet'"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_dino(**changes)


def test_settings_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_dino(patch_prototypes=8, masks=Masks(min_block=1), gram=Gram(first_step=100))
    with caplog.at_level(logging.WARNING, logger="ssmpretrain"):
        fit(model, ManyViews(count=2))
    assert "without model.ibot these have no effect: masks, patch_prototypes" in caplog.text
    assert "Gram anchoring begins at step 100, and the run ends at 2" in caplog.text
