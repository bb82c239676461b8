"""Graphs of an encoder made by others: torch.fx (torchvision, timm), torch.jit.trace, and the meta device."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor as timms_extractor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import ssmpretrain
from ssmpretrain.encoders.vim.text import MambaText

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("test_vim", {"depth": 2}),
    ("test_vim", {"depth": 2, "class_token": "double", "global_pool": "max", "bidirectional": "ssm"}),
    ("test_vmamba", {"depths": (1, 2)}),
    ("test_vmamba", {"depths": (1, 2), "downsample": "merge", "stem": "patch", "gate": True}),
    ("test_vmamba2", {"depths": (1, 2)}),
    ("test_arm", {"depth": 2}),
    ("test_arm", {"depth": 2, "directions": 1}),
]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join([form[0], *map(str, form[1].values())]))
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = request.param
    return ssmpretrain.create_encoder(name, num_classes=3, **arguments).eval()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (32, 32)))


def test_symbolic_tracing_gives_a_graph_for_images_of_any_size(encoder: nn.Module) -> None:
    graph = torch.fx.symbolic_trace(encoder)
    for x in (images(), images(64, 48)):
        torch.testing.assert_close(graph(x), encoder(x))
    with pytest.raises(ValueError, match="images are floating-point"):
        graph(torch.zeros(2, 4, 32, 32))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")
def test_feature_extractors_find_the_blocks(encoder: nn.Module, train: bool) -> None:
    blocks = [name for name, module in encoder.named_modules() if type(module).__name__.endswith("Block")]
    nodes = get_graph_node_names(encoder)[0]
    assert set(blocks) <= set(nodes)
    x, outputs = images(), {}
    for name in blocks:
        encoder.get_submodule(name).register_forward_hook(lambda m, i, y, name=name: outputs.update({name: y}))
    encoder.train(train)
    encoder(x)
    for make in (create_feature_extractor, timms_extractor):
        found = make(copy.deepcopy(encoder), {blocks[1]: "block"}).train(train)(x)
        torch.testing.assert_close(found["block"], outputs[blocks[1]])


@pytest.mark.parametrize("bidirectional", ["sequence", "layer"])
def test_what_a_graph_cannot_hold_is_refused_in_one_sentence(bidirectional: str) -> None:
    encoder = ssmpretrain.create_encoder("test_vim", bidirectional=bidirectional).train()
    with pytest.raises(ValueError, match=f"torch.fx cannot trace .*bidirectional='{bidirectional}'.*torch.export"):
        torch.fx.symbolic_trace(encoder)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_scripting_is_refused_in_one_sentence(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.script cannot compile it\. Use torch\.jit\.trace"):
        torch.jit.script(encoder)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_a_traced_encoder_answers_and_trains_alike(encoder: nn.Module, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(encoder, images())
    x = images()
    torch.testing.assert_close(traced(x), encoder(x))
    gradients = []
    for run in (encoder, traced):
        encoder.zero_grad()
        run(x).logsumexp(1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_a_traced_text_tower_reads_longer_texts_than_the_one_it_was_traced_with() -> None:
    torch.manual_seed(0)
    text, tokens = MambaText(8, 20, 16, 1, 4).eval(), torch.zeros(2, 8, dtype=torch.int64)
    tokens[:, 2] = 19
    traced = torch.jit.trace(text, tokens)
    longer = torch.randint(0, 19, (3, 8))
    longer[:, 6] = 19
    torch.testing.assert_close(traced(longer), text(longer))


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_arm"])
def test_on_the_meta_device_an_encoder_has_shapes_and_flops_and_becomes_real(name: str) -> None:
    real = timm.create_model(name, num_classes=3).eval()
    with torch.device("meta"):
        model, x = timm.create_model(name, num_classes=3).eval(), images()
    counts = []
    for run, batch in ((model, x), (real, images())):
        with FlopCounterMode(display=False) as counter:
            assert run(batch).shape == (2, 3)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = images()
    torch.testing.assert_close(model(x), real(x))
