import math

import pytest
import torch
import torch.nn.functional as F

from ssmpretrain.encoders.vim.blocks import VimBlocks, VimMixer


def published_pairs(blocks: VimBlocks, x: torch.Tensor) -> torch.Tensor:
    """The paired layers as the published code writes them: a hidden stream and a residual, each summed over a pair."""
    hidden, residual = x, None
    for ahead, back in zip(blocks.layers[::2], blocks.layers[1::2], strict=True):
        residual_ahead = hidden if residual is None else residual + hidden
        hidden_ahead = ahead.mixer(ahead.norm(residual_ahead))
        flipped = hidden.flip(1)
        residual_back = flipped if residual is None else residual.flip(1) + flipped
        hidden_back = back.mixer(back.norm(residual_back))
        hidden = hidden_ahead + hidden_back.flip(1)
        residual = residual_ahead + residual_back.flip(1)
    return blocks.norm_f(residual + hidden)


@torch.no_grad()
def test_paired_layers_sum_both_streams_as_published():
    torch.manual_seed(0)
    blocks = VimBlocks(4, 16, bidirectional="layer").eval()
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(blocks(x), published_pairs(blocks, x))


@torch.no_grad()
def test_the_first_version_is_the_second_with_everything_shared_but_the_decay():
    # With a convolution of one tap, "causal" and "anti-causal" are the same, so the two versions must agree.
    torch.manual_seed(0)
    shared = VimMixer(16, d_conv=1, bidirectional="ssm")
    shared.A_b_log.add_(0.3 * torch.randn_like(shared.A_b_log))
    own = VimMixer(16, d_conv=1, bidirectional="ssm_conv", divide_output=False)
    state = shared.state_dict()
    copies = {
        name.replace(part, f"{part}_b"): tensor
        for part in ("conv1d", "x_proj", "dt_proj")
        for name, tensor in state.items()
        if name.startswith(f"{part}.")
    }
    own.load_state_dict({**state, **copies, "D_b": state["D"]})
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(shared(x), own(x))


@torch.no_grad()
def test_one_direction_never_looks_ahead_and_two_do():
    torch.manual_seed(0)
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 6] += 1
    for kind, sees_ahead in {"none": False, "sequence": False, "layer": True, "ssm": True, "ssm_conv": True}.items():
        blocks = VimBlocks(2, 16, bidirectional=kind).eval()
        difference = (blocks(changed) - blocks(x)).abs().amax(-1)[0]
        assert (difference[:6].max() > 0) == sees_ahead, kind
        assert difference[6:].min() > 0, kind


@torch.no_grad()
def test_a_reversed_sequence_is_a_matter_of_training():
    torch.manual_seed(0)
    blocks = VimBlocks(2, 16, bidirectional="sequence", flip_probability=1.0)
    x = torch.randn(2, 7, 16)
    trained, evaluated = blocks(x), blocks.eval()(x)
    torch.testing.assert_close(trained, blocks(x.flip(1)).flip(1))
    assert not torch.allclose(trained, evaluated)
    never = VimBlocks(2, 16, bidirectional="sequence", flip_probability=0.0)
    never.load_state_dict(blocks.state_dict())
    assert torch.equal(never(x), evaluated)


@torch.no_grad()
def test_halving_the_sum_is_halving_the_output():
    torch.manual_seed(0)
    halved, whole = VimMixer(16), VimMixer(16, divide_output=False)
    whole.load_state_dict(halved.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(2 * halved(x), whole(x))


def test_initial_values_are_mambas():
    torch.manual_seed(0)
    blocks = VimBlocks(4, 64)
    mixer = blocks.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.equal(mixer.A_log, mixer.A_b_log)
    assert torch.equal(mixer.D, torch.ones(128))
    for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):
        dt = F.softplus(dt_proj.bias)
        assert 0.99e-3 < dt.min() < 3e-3
        assert 0.03 < dt.max() < 0.101
        assert dt_proj.weight.abs().max() <= 4**-0.5  # rank 64 / 16
    assert mixer.in_proj.bias is None
    bound = 1 / math.sqrt(128) / math.sqrt(4)  # kaiming-uniform with a = sqrt(5), over the root of the depth
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_the_published_backward_step_size_starts_at_softplus_of_zero():
    mixer = VimBlocks(2, 32, backward_dt_bias_init="zero").layers[0].mixer
    assert torch.equal(mixer.dt_proj_b.bias, torch.zeros(64))
    assert F.softplus(mixer.dt_proj.bias).max() < 0.101


def test_drop_path_rises_linearly_to_its_rate():
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in VimBlocks(5, 16, drop_path_rate=0.4).layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert VimBlocks(1, 16, drop_path_rate=0.4).layers[0].drop_path.drop_prob == 0.4


@pytest.mark.parametrize("kind", ["ssm_conv", "layer", "ssm"])
def test_gradient_checkpointing_gives_the_same_bits(kind):
    torch.manual_seed(0)
    blocks = VimBlocks(2, 16, bidirectional=kind, drop_path_rate=0.3)
    x = torch.randn(4, 7, 16)
    gradients = []
    for enable in (False, True):
        blocks.set_grad_checkpointing(enable)
        blocks.zero_grad()
        torch.manual_seed(1)
        blocks(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["ssm_conv", "none", "ssm"])
def test_autocast_keeps_the_stream_in_float32_and_every_number_finite(kind):
    torch.manual_seed(0)
    blocks = VimBlocks(2, 32, bidirectional=kind)
    x = 3 * torch.randn(2, 20, 32)
    streams = []
    blocks.layers[0].register_forward_hook(lambda module, args, output: streams.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = blocks(x)
    y.float().square().mean().backward()
    assert streams[0].dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in blocks.parameters())
    exact = blocks(x)
    # bfloat16 keeps 8 bits, an error of 2^-9 per rounding; a mixer rounds about ten times, some of them correlated.
    assert (y - exact).norm() / exact.norm() < 0.02


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_features():
    blocks = VimBlocks(2, 32).bfloat16()
    y = blocks(torch.randn(1, 5, 32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 3, "bidirectional": "layer"}, "depth is even; got 3"),
        ({"bidirectional": "both"}, "bidirectional is one of ssm_conv, none, sequence, layer, ssm; got 'both'"),
        ({"backward_dt_bias_init": "one"}, "backward_dt_bias_init is one of mamba, zero; got 'one'"),
        ({"depth": 0}, "depth is at least 1; got 0"),
        ({"d_state": 0}, "d_state is at least 1; got 0"),
        ({"expand": 0}, r"expand \* embed_dim is finite and at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is in \[0, 1\); got 1.0"),
        ({"flip_probability": 1.5}, r"flip_probability is in \[0, 1\]; got 1.5"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VimBlocks(**{"depth": 2, "embed_dim": 16, **arguments})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ssm_conv", "ssm", "none"])
def test_the_norm_of_the_scan_comes_before_the_gate(kind):
    torch.manual_seed(0)
    normed, plain = VimMixer(16, bidirectional=kind, scan_norm=True), VimMixer(16, bidirectional=kind)
    plain.load_state_dict({name: one for name, one in normed.state_dict().items() if "layernorm" not in name})
    torch.nn.init.uniform_(normed.layernorm.weight)
    torch.nn.init.uniform_(normed.layernorm.bias)
    x, z = torch.randn(2, 2, 11, 32).unbind(0)
    normed.out_proj = plain.out_proj = torch.nn.Identity()
    scanned = plain.mix(torch.cat([x, torch.full_like(z, 1.2784645427610738)], -1))  # silu of it is 1: no gate
    norm = F.layer_norm(scanned, (32,), normed.layernorm.weight, normed.layernorm.bias)
    torch.testing.assert_close(normed.mix(torch.cat([x, z], -1)), F.silu(z) * norm)


@pytest.mark.parametrize("kind", ["ssm_conv", "ssm", "layer"])
def test_blocks_with_a_normed_scan_train_every_parameter(kind):
    blocks = VimBlocks(2, 16, bidirectional=kind, scan_norm=True, branch_depth=8)
    assert blocks.layers[0].mixer.out_proj.weight.abs().max() < math.sqrt(1 / 32) / math.sqrt(8)
    blocks(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in blocks.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert blocks(torch.randn(2, 5, 16)).isfinite().all()
