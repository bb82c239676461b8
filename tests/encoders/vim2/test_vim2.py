import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.encoders.vim2 import Vim2, Vim2Mixer
from ssmpretrain.encoders.vim2.blocks import AttentionMixer

DIRECTIONS = ["shared", "separate", "none"]


def small(**options) -> Vim2:
    """Two blocks on a grid of 3 x 2 patches, with 4 heads of 8 channels."""
    torch.manual_seed(0)
    sizes = {"img_size": (48, 32), "embed_dim": 16, "depth": 2, "mlp_ratio": 2, "d_state": 5, "head_dim": 8}
    return Vim2(**{**sizes, "num_classes": 5, **options})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 48, 32, generator=torch.Generator().manual_seed(1))


def stirred(module: nn.Module) -> nn.Module:
    """The same module in float64 with no parameter at a value that hides a mistake: steps and decays are of order 1."""
    module = module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dt_" in name or "A_log" in name:
                parameter.normal_()
            else:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return module


# The computation, written again from the published description: one image, one token, one head at a time


def slow_convolution(state: dict[str, Tensor], name: str, rows: Tensor, ahead: int) -> Tensor:
    """Depthwise convolution of rows (L, channels) and its SiLU; the last tap reads `ahead` tokens past the token."""
    weight, bias = state[f"{name}.weight"][:, 0], state[f"{name}.bias"]
    outputs = []
    for t in range(len(rows)):
        total = bias.clone()
        for w in range(weight.shape[1]):
            s = t + ahead - (weight.shape[1] - 1 - w)
            if 0 <= s < len(rows):
                total = total + weight[:, w] * rows[s]
        outputs.append(F.silu(total))
    return torch.stack(outputs)


def slow_scan(rows: Tensor, dt: Tensor, A: Tensor, N: int, groups: int) -> Tensor:
    """y = C h with h = exp(dt A) h + dt B x, of rows x, B and C side by side, (L, E + 2GN): (L, H, P)."""
    heads = len(A)
    x, B, C = rows.split([rows.shape[1] - 2 * groups * N, groups * N, groups * N], dim=1)
    x, B, C = x.view(len(rows), heads, -1), B.view(-1, groups, N), C.view(-1, groups, N)
    y = torch.zeros_like(x)
    for head in range(heads):
        h, group = torch.zeros(x.shape[2], N, dtype=x.dtype), head * groups // heads
        for t in range(len(rows)):
            h = torch.exp(dt[t, head] * A[head]) * h + dt[t, head] * torch.outer(x[t, head], B[t, group])
            y[t, head] = h @ C[t, group]
    return y


def slow_gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int) -> Tensor:
    gated = (y * z * torch.sigmoid(z)).unflatten(1, (groups, -1))
    return (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * weight


def slow_mixer(state: dict[str, Tensor], tokens: Tensor, groups: int) -> Tensor:
    """The mixer of one image's tokens, (L, D)."""
    heads, (channels, _, W) = len(state["A_log"]), state["conv1d.weight"].shape
    inner = state["out_proj.weight"].shape[1]
    N = (channels - inner) // (2 * groups)
    z, rows, dt = (tokens @ state["in_proj.weight"].T).split([inner, channels, heads], dim=1)
    steps = {suffix: F.softplus(dt + state[f"dt{suffix}_bias"]) for suffix in ("", "_b") if f"dt{suffix}_bias" in state}
    A = {suffix: -state[f"A_log{suffix}"].exp() for suffix in steps}

    def one(convolved: Tensor, suffix: str) -> Tensor:
        return slow_scan(convolved, steps[suffix], A[suffix], N, groups)

    if "conv1d_b.weight" in state:
        sides = []
        for suffix, flip in {"": False, "_b": True}.items():
            order = range(len(tokens))[::-1] if flip else range(len(tokens))
            convolved = slow_convolution(state, f"conv1d{suffix}", rows[list(order)], 0)
            steps[suffix] = steps[suffix][list(order)]
            y = one(convolved, suffix) + state[f"D{suffix}"][:, None] * convolved[:, :inner].view(
                -1, heads, inner // heads
            )
            sides.append(slow_gated_norm(y.flatten(1)[list(order)], z, state[f"norm{suffix}.weight"], groups))
        return (sides[0] + sides[1]) / 2 @ state["out_proj.weight"].T
    both = "A_log_b" in state
    convolved = slow_convolution(state, "conv1d", rows, W - 1 - W // 2 if both else 0)
    y = one(convolved, "")
    if both:
        steps["_b"] = steps["_b"].flip(0)
        y = (y + one(convolved.flip(0), "_b").flip(0)) / 2
    y = y + state["D"][:, None] * convolved[:, :inner].view(-1, heads, inner // heads)
    return slow_gated_norm(y.flatten(1), z, state["norm.weight"], groups) @ state["out_proj.weight"].T


def slow_attention(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """One head of softmax attention."""
    q, k, v = (tokens @ state["qkv.weight"].T + state["qkv.bias"]).chunk(3, dim=1)
    weights = torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1)
    return weights @ v @ state["out_proj.weight"].T + state["out_proj.bias"]


def slow_encoder(state: dict[str, Tensor], image: Tensor, groups: int) -> Tensor:
    """Logits of one image (3, H, W)."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    h, w = image.shape[1] // 16, image.shape[2] // 16
    patches = image.reshape(3, h, 16, w, 16).permute(1, 3, 0, 2, 4).reshape(h * w, -1)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    middle = h * w // 2
    x = torch.cat([x[:middle], state["cls_token"][0], x[middle:]]) + state["pos_embed"][0]
    for layer in range(2):
        mixer, inner = below(f"layers.{layer}.mixer."), norm(x, f"layers.{layer}.norm")
        x = x + (slow_attention(mixer, inner) if "qkv.weight" in mixer else slow_mixer(mixer, inner, groups))
        mlp = below(f"layers.{layer}.mlp.")
        if mlp:
            hidden = F.gelu(norm(x, f"layers.{layer}.norm2") @ mlp["fc1.weight"].T + mlp["fc1.bias"])
            x = x + hidden @ mlp["fc2.weight"].T + mlp["fc2.bias"]
    return norm(x, "norm_f")[middle] @ state["head.weight"].T + state["head.bias"]


FORMS = {
    "shared": {},
    "shared, 3 taps, 2 groups": {"num_groups": 2, "d_conv": 3},
    "separate": {"bidirectional": "separate", "mlp_ratio": 0},
    "separate, 2 groups": {"bidirectional": "separate", "num_groups": 2},
    "none": {"bidirectional": "none"},
    "attention last": {"attention_blocks": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_encoder_computes_its_equations(options):
    model, image = stirred(small(**options)), images(1)[0].double()
    torch.testing.assert_close(
        model(image[None])[0], slow_encoder(model.state_dict(), image, options.get("num_groups", 1))
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["A_log_b", "dt_b_bias"])
def test_the_backward_direction_has_its_own_steps_and_decays(name):
    model, image = stirred(small()), images(1)[0].double()
    before = model(image[None])[0]
    model.get_parameter(f"layers.1.mixer.{name}")[2] += 0.5
    after = model(image[None])[0]
    assert (after - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(after, slow_encoder(model.state_dict(), image, 1))


@torch.no_grad()
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_float32_kernels_agree_with_float64(directions):
    model = small(bidirectional=directions, img_size=(160, 160), depth=1)  # 101 tokens
    wide = torch.randn(2, 3, 160, 160)
    expected = copy.deepcopy(model).double()(wide.double())
    assert (model(wide).double() - expected).norm() < 2e-6 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_which_tokens_a_token_reads(directions):
    torch.manual_seed(0)
    mixer = Vim2Mixer(16, 4, 4, 2, 8, 1, directions)
    x = torch.randn(1, 11, 16)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (mixer(changed) != mixer(x)).any(-1)[0]
    assert moved[5:].all() and moved[:5].all() == (directions != "none")


@torch.no_grad()
@pytest.mark.parametrize("directions", ["shared", "separate"])
def test_halving_is_of_the_two_directions(directions):
    torch.manual_seed(0)
    halved, whole = (Vim2Mixer(16, 4, 4, 2, 8, 1, directions, halve) for halve in (True, False))
    stirred(halved).D.zero_()
    whole.double().load_state_dict(halved.state_dict())
    whole.norm.eps = 4 * halved.norm.eps if directions == "shared" else halved.norm.eps
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    ratio = 2 if directions == "separate" else 1  # "shared" is halved before its norm, which takes a factor off
    torch.testing.assert_close(ratio * halved(x), whole(x))


def published_names(
    separate: bool, dim: int = 16, heads: int = 4, N: int = 5, W: int = 4
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mamba-ssm's Mamba2, or of Dino-Mamba's with both directions."""
    inner = 2 * dim
    channels = inner + 2 * N
    shapes: dict[str, tuple[int, ...]] = {"in_proj.weight": (2 * inner + 2 * N + heads, dim)}
    for suffix, bias in (("", "dt_bias"), ("_b", "dt_b_bias")) if separate else (("", "dt_bias"),):
        shapes |= {f"conv1d{suffix}.weight": (channels, 1, W), f"conv1d{suffix}.bias": (channels,), bias: (heads,)}
        shapes |= {f"A_log{suffix}": (heads,), f"D{suffix}": (heads,), f"norm{suffix}.weight": (inner,)}
    return shapes | {"out_proj.weight": (dim, inner)}


@pytest.mark.parametrize("separate", [False, True], ids=["mamba-ssm", "Dino-Mamba"])
def test_published_mixers_load_strictly(separate):
    mixer = Vim2Mixer(16, 5, 4, 2, 8, 1, "separate" if separate else "none")
    state = {name: torch.randn(shape) for name, shape in published_names(separate).items()}
    mixer.load_state_dict(state, strict=True)
    assert all(torch.equal(mixer.state_dict()[name], tensor) for name, tensor in state.items())


# timm's vocabulary


def test_every_parameter_is_trained():
    for options in FORMS.values():
        model = small(**options)
        model(images()).square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_initial_values_are_mambas():
    model = small(embed_dim=256, bidirectional="separate", head_dim=4)
    mixer = model.layers[0].mixer
    for A_log, D, bias in ((mixer.A_log, mixer.D, mixer.dt_bias), (mixer.A_log_b, mixer.D_b, mixer.dt_b_bias)):
        assert 1 <= A_log.exp().min() < 3 and 14 < A_log.exp().max() <= 16.001
        assert (D == 1).all()
        steps = F.softplus(bias)
        assert 1e-4 <= steps.min() < 3e-3 and 0.03 < steps.max() < 0.101


@torch.no_grad()
@pytest.mark.parametrize("read", ["stream", "mixer"])
def test_intermediate_maps_are_the_stream_or_the_mixers_output(read):
    model = small().eval()
    seen: list[Tensor] = []
    tokens, _ = model.embed_all(images())
    for block in model.layers:
        mixed = block.mixer(block.norm(tokens))
        tokens = tokens + mixed
        tokens = tokens + block.mlp(block.norm2(tokens))
        seen.append(mixed if read == "mixer" else tokens)
    final, maps = model.forward_intermediates(images(), output_fmt="NLC", read=read)
    for one, expected in zip(maps, seen, strict=True):
        torch.testing.assert_close(one, torch.cat([expected[:, :3], expected[:, 4:]], 1))
    torch.testing.assert_close(final, model.forward_features(images()))
    first = model.forward_intermediates(images(), [0], stop_early=True, intermediates_only=True, read=read)
    assert first[0].shape == (2, 16, 3, 2)


@torch.no_grad()
def test_features_only_gives_maps_for_a_detector():
    model = timm.create_model("test_vim2", features_only=True, out_indices=(1, 3), img_size=64)
    assert [tuple(one.shape) for one in model(torch.randn(2, 3, 64, 128))] == [(2, 32, 4, 8)] * 2
    pyramid = timm.create_model("test_vim2", features_only=True, feature_cls="pyramid", img_size=64)
    assert [one.shape[-1] for one in pyramid(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


@torch.no_grad()
def test_setting_the_input_size_gives_the_answers_of_resizing_on_the_way():
    model, wide = small().eval(), torch.randn(1, 3, 32, 80)
    before = model(wide)
    model.set_input_size((32, 80))
    assert model.pos_embed.shape == (1, 11, 16)
    torch.testing.assert_close(model(wide), before)


def test_the_classifier_can_be_replaced_and_removed():
    model = small()
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 16)


def test_registers_stand_between_the_patches():
    model = small(class_token="registers", num_registers=3)
    assert model.forward_features(images()).shape == (2, 9, 16)
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weight_decay_spares_the_state_space_of_both_directions():
    spared = small(bidirectional="separate").no_weight_decay()
    kinds = {name.split("mixer.")[-1] for name in spared if "mixer" in name}
    assert kinds == {"A_log", "A_log_b", "D", "D_b", "dt_bias", "dt_b_bias"}
    assert spared >= {"pos_embed", "cls_token"} and spared <= set(small(bidirectional="separate").state_dict())


def test_layer_decay_gives_each_block_its_own_rate():
    model = timm.create_model("test_vim2")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates[id(model.cls_token)] == 0.5**5 and rates[id(model.head.weight)] == 1
    assert [rates[id(block.mixer.A_log_b)] for block in model.layers] == [0.5**4, 0.5**3, 0.5**2, 0.5]


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


def test_stochastic_depth_rises_to_the_last_block_and_drops_both_branches():
    model = small(depth=3, drop_path_rate=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers] == pytest.approx([0, 0.2, 0.4])
    block = model.train().layers[2]
    block.drop_path.drop_prob = 1 - 1e-9
    x = torch.randn(4, 7, 16)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_autocast_keeps_stream_steps_and_decays_in_float32(monkeypatch):
    model, seen, streams = small(embed_dim=32), [], []

    def spy(x, dt, A, *rest, **named):
        seen.append((x.dtype, dt.dtype, A.dtype, named["dt_backward"].dtype))
        return kernel(x, dt, A, *rest, **named)

    from ssmpretrain.encoders.vim2 import mixer

    kernel = mixer.bidirectional_ssd
    monkeypatch.setattr(mixer, "bidirectional_ssd", spy)
    model.layers[0].register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images())
    logits.float().square().sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}
    assert streams == [torch.float32]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # bfloat16 keeps 8 bits, an error of 2^-9 per rounding; a block rounds about fifteen times, some correlated.
    assert (logits - model(images())).norm() / logits.norm() < 0.03


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_logits():
    logits = small().bfloat16()(images().bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("directions", ["shared", "separate"])
def test_one_graph_captures_the_whole_model(directions):
    # Captured and differentiated ahead of time, but not compiled: generating code takes most of a minute.
    model = small(bidirectional=directions, depth=1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), model(images()))


@torch.no_grad()
def test_copies_and_averages_are_of_their_own():
    model = small().eval()
    average = ModelEmaV3(model, decay=0.5)
    twin = copy.deepcopy(model)
    model.layers[0].mixer.A_log_b.add_(1)
    average.update(model)
    assert not torch.equal(twin(images()), model(images()))
    moved = average.module.layers[0].mixer.A_log_b - twin.layers[0].mixer.A_log_b
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5))


@torch.no_grad()
def test_a_traced_graph_computes_the_same():
    model = small().eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), model(images()))


def test_the_last_blocks_may_have_attention():
    model = small(attention_blocks=1)
    assert [isinstance(block.mixer, AttentionMixer) for block in model.layers] == [False, True]
    assert model.mixer is model.layers[0].mixer
    assert small(attention_blocks=2).mixer is None
    assert AttentionMixer(192).num_heads == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": "both"}, "Vim2: bidirectional is one of shared, separate, none; got 'both'"),
        ({"head_dim": 7}, "Vim2: head_dim divides expand .* = 32; got 7"),
        ({"num_groups": 3}, "Vim2: num_groups divides the 4 heads; got 3"),
        ({"attention_blocks": 3}, "Vim2: attention_blocks is from 0 to the depth, 2; got 3"),
        ({"attention_blocks": 1, "embed_dim": 80}, "Vim2: embed_dim is a multiple of 64 with attention_blocks"),
        ({"mlp_ratio": -1}, "Vim2: mlp_ratio is finite and at least 0; got -1"),
        ({"depth": 0}, "Vim2: depth is at least 1; got 0"),
        ({"d_state": 0}, "Vim2: d_state is at least 1; got 0"),
        ({"drop_path_rate": 1.0}, r"Vim2: drop_path_rate is in \[0, 1\); got 1.0"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_an_unknown_argument_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"test_vim2 takes no argument 'num_group'\. Did you mean 'num_groups'"):
        ssmpretrain.create_encoder("test_vim2", num_group=1)
