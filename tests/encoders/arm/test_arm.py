import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor

import ssmpretrain
from ssmpretrain.encoders.arm.arm import ARMEncoder, ARMMixer, transpose_grid
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed

# The paper's table gives 85, 297 and 662 M.
NUM_PARAMETERS = {
    "arm_base_patch16_224": 85_031_656,
    "arm_large_patch16_224": 297_035_720,
    "arm_huge_patch16_224": 662_682_088,
}


def small(**options) -> ARMEncoder:
    """Two blocks on a grid of 3 x 2 patches."""
    torch.manual_seed(0)
    return ARMEncoder(**{"img_size": (48, 32), "embed_dim": 16, "depth": 2, "d_state": 3, "num_classes": 5, **options})


def images(B: int = 2) -> Tensor:
    return torch.randn(B, 3, 48, 32, generator=torch.Generator().manual_seed(1))


# The computation, written again from the published description: one image, one token, one direction at a time


def slow_scan(state: dict[str, Tensor], suffix: str, xz: Tensor) -> Tensor:
    """Mamba's scan of tokens (L, 2E) in the order given, gated: (L, E)."""
    x, z = xz.chunk(2, dim=-1)
    weight, bias = state[f"conv1d{suffix}.weight"][:, 0], state[f"conv1d{suffix}.bias"]
    A, skip = -state[f"A{suffix}_log"].exp(), state[f"D{suffix}"]
    rank, N, W = state[f"dt_proj{suffix}.weight"].shape[1], A.shape[1], weight.shape[1]
    h, outputs = torch.zeros_like(A), []
    for t in range(len(x)):
        taps = [weight[:, W - 1 - back] * x[t - back] for back in range(W) if t >= back]
        u = F.silu(torch.stack(taps).sum(0) + bias)
        dt, B, C = (state[f"x_proj{suffix}.weight"] @ u).split([rank, N, N])
        delta = F.softplus(state[f"dt_proj{suffix}.weight"] @ dt + state[f"dt_proj{suffix}.bias"])
        h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        outputs.append((h @ C + skip * u) * F.silu(z[t]))
    return torch.stack(outputs)


def slow_mixer(state: dict[str, Tensor], x: Tensor, h: int, w: int) -> Tensor:
    """The mixer of one image's tokens (L, D); four directions if the state has them."""
    xz = x @ state["in_proj.weight"].T
    if "D_c" not in state:
        return slow_scan(state, "", xz) @ state["out_proj.weight"].T
    middle = h * w // 2
    place = [row * w + column for column in range(w) for row in range(h)]  # column by column
    place = [patch if patch < middle else patch + 1 for patch in place]
    by_columns = [*place[:middle], middle, *place[middle:]]
    by_rows = list(range(h * w + 1))
    total = torch.zeros(len(x), xz.shape[1] // 2, dtype=x.dtype)
    for suffix, order in {"": by_rows, "_b": by_rows[::-1], "_c": by_columns, "_c_b": by_columns[::-1]}.items():
        total[order] += slow_scan(state, suffix, xz[order])
    return (total / 4) @ state["out_proj.weight"].T


def slow_encoder(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """Logits of one image (3, H, W) from a state dict under the official names."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    h, w = image.shape[1] // 16, image.shape[2] // 16
    patches = image.reshape(3, h, 16, w, 16).permute(1, 3, 0, 2, 4).reshape(h * w, -1)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    middle = h * w // 2
    if "cls_token" in state:
        x = torch.cat([x[:middle], state["cls_token"][0], x[middle:]])
    x = x + state["pos_embed"][0]
    for layer in range(2):
        x = x + slow_mixer(below(f"layers.{layer}.mixer."), norm(x, f"layers.{layer}.norm1"), h, w)
        mlp, inner = below(f"layers.{layer}.mlp."), norm(x, f"layers.{layer}.norm2")
        gate, value = (inner @ mlp[f"w{i}.weight"].T + mlp[f"w{i}.bias"] for i in (1, 2))
        x = x + (F.silu(gate) * value) @ mlp["w3.weight"].T + mlp["w3.bias"]
    x = norm(x, "norm_f")
    if "cls_token" in state:
        x = torch.cat([x[:middle], x[middle + 1 :]])
    return x.mean(0) @ state["head.weight"].T + state["head.bias"]


@torch.no_grad()
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("size", [(48, 32), (32, 64), (16, 80)])
def test_the_encoder_computes_what_is_published(directions, size):
    model = small(directions=directions, img_size=size).double().eval()
    for parameter in model.parameters():  # nothing at a value that hides a mistake
        parameter.add_(0.3 * torch.randn_like(parameter))
    image = torch.randn(3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(image[None])[0], slow_encoder(model.state_dict(), image))


def test_transposing_a_grid_keeps_the_class_token_in_the_middle():
    sequence = torch.tensor([0, 1, 2, 9, 3, 4, 5]).view(1, 7, 1)  # patches 0..5 of 3 x 2, class token 9
    columns = transpose_grid(sequence, (3, 2))
    assert columns.flatten().tolist() == [0, 2, 4, 9, 1, 3, 5]
    assert torch.equal(transpose_grid(columns, (2, 3)), sequence)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 130])  # 130: past the blocks in which a scan is computed
def test_one_direction_is_causal_and_four_are_not(length):
    torch.manual_seed(0)
    x = torch.randn(1, length, 16)
    changed = x.clone()
    changed[:, length // 2] += 1
    one, four = small(directions=1), ARMMixer(16, 3, 4)
    moved = (one.run(x)[0] != one.run(changed)[0]).any(-1)[0]
    assert not moved[: length // 2].any() and moved[length // 2 : length // 2 + 3].all()
    grid = (1, length - 1)
    assert (four(x, grid) != four(changed, grid)).any(-1)[0, length // 2 - 2 :][:5].all()


# timm's vocabulary


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_published_variant_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]


def test_names_are_the_official_ones():
    mixer = {"A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    further = {"A{}_log", "D{}", "conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight"}
    further |= {"dt_proj{}.bias"}
    block = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mixer.in_proj.weight"}
    block |= {"mixer.out_proj.weight", *(f"mlp.w{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias"))}
    stem = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm_f.weight", "norm_f.bias"}
    head = {"head.weight", "head.bias"}
    one = block | {f"mixer.{name}" for name in mixer}
    four = one | {f"mixer.{name.format(suffix)}" for name in further for suffix in ("_b", "_c", "_c_b")}
    for directions, names in {1: one, 4: four}.items():
        expected = stem | head | {f"layers.{i}.{name}" for i in range(2) for name in names}
        expected |= {"cls_token"} if directions == 4 else set()
        assert set(small(directions=directions).state_dict()) == expected


@pytest.mark.parametrize("directions", [1, 4])
def test_every_parameter_is_trained_but_fixed_positions(directions):
    model = small(directions=directions)
    model(images()).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == ({"pos_embed"} if directions == 1 else set())


def test_positions_are_fixed_for_one_direction_and_learned_for_four():
    one, four = small(directions=1), small()
    assert torch.equal(one.pos_embed, sincos_pos_embed(16, (3, 2)))
    assert not one.pos_embed.requires_grad and four.pos_embed.requires_grad
    assert small(directions=1, pos_embed="learned").pos_embed.requires_grad
    assert not small(pos_embed="sincos").pos_embed.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("directions", [1, 4])
def test_intermediate_maps_are_the_stream_after_each_block(directions):
    model = small(directions=directions).eval()
    final, maps = model.forward_intermediates(images(), norm=True)
    assert [tuple(one.shape) for one in maps] == [(2, 16, 3, 2)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), model.split_tokens(final)[1])
    assert torch.equal(final, model.forward_features(images()))
    first = model.forward_intermediates(images(), [0], stop_early=True, intermediates_only=True)
    assert not torch.equal(first[0], maps[0])  # one is normed
    assert model.prune_intermediate_layers([0]) == [0] and len(model.layers) == 1
    assert torch.equal(model.forward_intermediates(images(), [0], intermediates_only=True)[0], first[0])


@torch.no_grad()
def test_features_only_gives_maps_for_a_detector():
    model = timm.create_model("test_arm", features_only=True, out_indices=(1, 3), img_size=64)
    assert [tuple(one.shape) for one in model(torch.randn(2, 3, 64, 128))] == [(2, 32, 4, 8)] * 2
    assert model.feature_info.channels() == [32, 32]


@torch.no_grad()
def test_setting_the_input_size_gives_the_answers_of_resizing_on_the_way():
    model, wide = small().eval(), torch.randn(1, 3, 32, 80)
    before = model(wide)
    model.set_input_size((32, 80))
    assert model.pos_embed.shape == (1, 11, 16)
    torch.testing.assert_close(model(wide), before)


def test_weight_decay_spares_the_state_space_of_every_direction():
    spared = small().no_weight_decay()
    kinds = {name.split("mixer.")[-1] for name in spared if "mixer" in name}
    suffixes = ("", "_b", "_c", "_c_b")
    assert kinds == {name for s in suffixes for name in (f"A{s}_log", f"D{s}", f"dt_proj{s}.bias")}
    assert spared >= {"pos_embed", "cls_token"} and spared <= set(small().state_dict())


def test_layer_decay_gives_each_block_its_own_rate():
    model = timm.create_model("test_arm")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates[id(model.cls_token)] == 0.5**5 and rates[id(model.head.weight)] == 1
    assert [rates[id(block.mlp.w3.weight)] for block in model.layers] == [0.5**4, 0.5**3, 0.5**2, 0.5]


def test_gradient_checkpointing_gives_the_same_bits():
    model = small(drop_path_rate=0.2)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 4])
def test_one_graph_captures_the_whole_model(directions):
    # Captured and differentiated ahead of time, but not compiled: generating code takes most of a minute.
    model = small(directions=directions)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), model(images()))


def test_stochastic_depth_rises_to_the_last_block():
    model = small(depth=3, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0, 0, 0.15])


@pytest.mark.parametrize("directions", [1, 4])
def test_autocast_keeps_the_stream_in_float32_and_every_number_finite(directions):
    model = small(directions=directions, embed_dim=32)
    streams: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, args, output: streams.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images())
    logits.float().square().sum().backward()
    assert streams[0].dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    # bfloat16 keeps 8 bits, an error of 2^-9 per rounding; a block rounds about fifteen times, some correlated.
    assert (logits - model(images())).norm() / logits.norm() < 0.03


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_logits():
    logits = small().bfloat16()(images().bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_initial_values_are_mambas_in_every_direction():
    model = small(embed_dim=64, d_state=16)
    for mixer in (block.mixer for block in model.layers):
        for suffix in ("", "_b", "_c", "_c_b"):
            assert torch.allclose(getattr(mixer, f"A{suffix}_log").exp(), torch.arange(1.0, 17))
            assert (getattr(mixer, f"D{suffix}") == 1).all()
            steps = F.softplus(getattr(mixer, f"dt_proj{suffix}").bias)
            assert steps.min() >= 1e-4 and steps.max() <= 0.1001 and steps.std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 2}, "ARMEncoder: directions is 1 or 4; got 2"),
        ({"depth": 0}, "ARMEncoder: depth is at least 1; got 0"),
        ({"embed_dim": 0}, "embed_dim is at least 1"),
        ({"d_state": 0}, "d_state is at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is in \[0, 1\); got 1.0"),
        ({"directions": 1, "global_pool": "token"}, "ARMEncoder: global_pool='token' reads the class token"),
        ({"img_size": 50}, "Resize or crop its height from 50 to 48 or 64 pixels"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_four_directions_refuse_a_part_of_the_patches():
    model = small()
    tokens = model.embed(images())
    for patches, grid in ((tokens[:, :4], (3, 2)), (tokens, None)):
        with pytest.raises(ValueError, match=rf"whole grid; got {patches.shape[1]} patches.*Use directions=1"):
            model.forward_tokens(patches, grid)


def test_an_unknown_argument_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"test_arm takes no argument 'direction'\. Did you mean 'directions'"):
        ssmpretrain.create_encoder("test_arm", direction=1)
