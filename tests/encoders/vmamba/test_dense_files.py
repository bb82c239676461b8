"""Checkpoints of segmentation and detection as mmengine writes them."""

import sys
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch

import ssmpretrain
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features import TappedEncoder, Taps

_WIDTHS = (16, 32, 64, 128)


class HistoryBuffer:
    """Pickles as mmengine's class does: arrays, numbers, and its own methods by `getattr`."""

    def __init__(self):
        self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([])

    def mean(self):
        raise AssertionError("nothing in a file is called")

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    def __setstate__(self, state):
        raise AssertionError("nothing in a file is called")


def tensors(**options):
    """Return the tensors of a dense model: encoder without final norm, norms of the stages, heads."""
    torch.manual_seed(0)
    encoder = ssmpretrain.create_encoder("test_vmamba", num_classes=0, **options)
    state = {f"backbone.{key}": one for key, one in encoder.state_dict().items() if not key.startswith("classifier.")}
    for stage, width in enumerate(_WIDTHS):
        state[f"backbone.outnorm{stage}.weight"] = torch.full((width,), 1.0 + stage)
        state[f"backbone.outnorm{stage}.bias"] = torch.full((width,), 0.5 * stage)
    heads = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias", "auxiliary_head.conv_seg.weight")
    return encoder, OrderedDict(state | {name: torch.zeros(3) for name in heads})


@pytest.fixture
def save(tmp_path, monkeypatch):
    def save(state):
        module = ModuleType("mmengine.logging.history_buffer")
        module.HistoryBuffer = HistoryBuffer
        logs = OrderedDict({"train/loss": HistoryBuffer()})
        meta = {"iter": 160000, "cfg": "model = dict()", "dataset_meta": {"classes": ("wall", "floor")}}
        content = {"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
        content["message_hub"] = {"log_scalars": logs, "runtime_info": OrderedDict(mIoU=np.float64(47.9))}
        with monkeypatch.context() as patch:
            for name in ("mmengine", "mmengine.logging"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, module.__name__, module)
            for one in (HistoryBuffer, HistoryBuffer.mean):
                patch.setattr(one, "__module__", module.__name__, raising=False)
            torch.save(content, tmp_path / "iter_160000.pth")
        return tmp_path / "iter_160000.pth"

    return save


@pytest.mark.parametrize("options", [{}, {"gate": True, "mlp_ratio": 0, "stem": "patch", "downsample": "merge"}])
@torch.no_grad()
def test_a_dense_checkpoint_fills_the_encoder_and_the_norms_of_its_taps(save, options):
    encoder, state = tensors(**options)
    loaded = ssmpretrain.load_encoder(save(state))
    report = loaded.load_report
    assert report.fresh == ("classifier.norm.weight", "classifier.norm.bias")
    assert report.loaded == report.total - 2 == len(state) - 8 - 3
    assert "norms of stages 0, 1, 2, 3 kept for dense tasks" in str(report)
    assert "tensors not read: decode_head (2), auxiliary_head (1)" in str(report)

    images = torch.randn(1, 3, 40, 56)
    expected = encoder.eval().forward_intermediates(images, intermediates_only=True)
    for stage, (one, plain) in enumerate(zip(TappedEncoder(loaded.eval())(images), expected, strict=True)):
        mean, variance = plain.mean(1, keepdim=True), plain.var(1, unbiased=False, keepdim=True)
        normed = (plain - mean) / (variance + 1e-5).sqrt() * (1 + stage) + 0.5 * stage
        torch.testing.assert_close(one, normed, rtol=1e-4, atol=1e-4)


def test_taps_that_leave_norms_of_the_file_out_say_so(save, caplog):
    _, state = tensors()
    encoder = ssmpretrain.load_encoder(save(state))
    assert list(TappedEncoder(encoder, Taps(indices=[1, 2])).norms) == ["1", "2"]
    assert not caplog.records or "leaves them out" not in caplog.text
    TappedEncoder(encoder, Taps(norm="none"))
    assert "norm='none' leaves them out" in caplog.text
    three = {key: one for key, one in state.items() if "outnorm1" not in key}
    with pytest.raises(UserError, match=r"has norms of the stages \[0, 2, 3\], and taps.indices also names \[1\]"):
        TappedEncoder(ssmpretrain.load_encoder(save(three)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.layers.2.blocks.1.op.Ds"), "missing: layers.2.blocks.1.op.Ds"),
        (lambda state: state.pop("backbone.outnorm2.bias"), "outnorm2 has a weight and a bias .* stage 2, 64; got"),
        (lambda state: state.update({"backbone.outnorm1.weight": torch.ones(9)}), r"stage 1, 32; got .*\(9,\)"),
        (lambda state: state.update({"backbone.outnorm4.bias": torch.ones(9)}), "stage 4, which does not exist"),
        (lambda state: state["backbone.outnorm0.weight"].fill_(float("nan")), "norm 0 weight"),
    ],
)
def test_a_dense_checkpoint_that_is_not_whole_is_refused(save, change, message):
    _, state = tensors()
    change(state)
    with pytest.raises(UserError, match=message):
        ssmpretrain.load_encoder(save(state))
