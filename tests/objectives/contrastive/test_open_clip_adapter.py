"""The adapter gives the same results as open_clip."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from open_clip.tokenizer import SimpleTokenizer

from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer, contrastive_loss, text_transformer

TEXTS = {
    "empty": "",
    "blanks": " \t\n ",
    "plain": "A photo of a cat.",
    "possessives": "it's we'll they've I'd you're I'm he's",
    "digits": "3.14159 and 2026-11-21",
    "emoji": "🐱👩‍👩‍👧‍👦🏳️‍🌈 family",
    "Chinese": "一只猫坐在窗台上",
    "Arabic and combining marks": "قطة e\u0301 n\u0303 \u200bzero",
    "HTML entities": "cats &amp;amp; dogs &lt;b&gt; &eacute;",
    "broken encoding": "cafÃ© \ufffd â€œquotedâ€\x9d",
    "special tokens": "<start_of_text> odd <end_of_text> caption",
    "control characters": "a\x00b\x07c\r\nd",
    "one long word": "Donaudampfschifffahrt" * 40,
    "10,000 characters": "red square above blue circle, " * 334,
    "10,000 emoji": "🐱" * 10_000,
}

THEIRS = SimpleTokenizer()


@pytest.mark.parametrize("context_length", [3, 16, 77])
def test_tokens_are_those_of_open_clip(context_length: int) -> None:
    texts = list(TEXTS.values())
    tokens, cut = Tokenizer(context_length)(texts)
    assert torch.equal(tokens, THEIRS(texts, context_length))
    assert tokens.dtype == torch.int64 and tokens.shape == (len(texts), context_length)
    lengths = torch.tensor([len(THEIRS.encode(text)) + 2 for text in texts])
    assert torch.equal(cut, lengths > context_length)


def test_a_text_that_just_fits_is_not_cut_and_one_with_a_token_more_is() -> None:
    tokenizer = Tokenizer(16)
    tokens, cut = tokenizer(["a " * 13, "a " * 14, "a " * 15])  # 15, 16 and 17 with start and end
    assert cut.tolist() == [False, False, True]
    end = tokenizer.vocab_size - 1
    assert (tokens == end).nonzero().tolist() == [[0, 14], [1, 15], [2, 15]]


def test_no_texts_give_no_tokens() -> None:
    tokens, cut = Tokenizer()([])
    assert tokens.shape == (0, 77) and cut.shape == (0,)


def test_the_memory_of_the_tokenizer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmpretrain.objectives.contrastive.open_clip_adapter._MOST_WORDS", 50)
    tokenizer = Tokenizer(8)
    for number in range(40):
        texts = [f"word{chr(97 + number % 26)}{chr(97 + number // 26)}x", "special <end_of_text>", "cat"]
        assert torch.equal(tokenizer(texts)[0], THEIRS(texts, 8))
    assert len(tokenizer._encoder.cache) <= 50 + 10


@torch.no_grad()
def test_the_transformer_is_the_text_tower_of_open_clips_clip() -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    settings = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    torch.manual_seed(0)
    clip = open_clip.CLIP(24, vision, settings).eval()
    tower = text_transformer(24, *settings.values()).eval()
    tower.load_state_dict({key: value for key, value in clip.state_dict().items() if key in tower.state_dict()})
    tokens, _ = Tokenizer(16)(["", "a cat", "a very long caption " * 20])
    assert torch.equal(tower(tokens), clip.encode_text(tokens))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_loss_on_one_process_is_open_clips(kind: str) -> None:
    noise = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8, generator=noise), dim=-1) for _ in range(2))
    bias = [torch.tensor([-3.0])] if kind == "siglip" else []
    given = [image, text, torch.tensor([12.0]), *bias]
    theirs = SigLipLoss() if kind == "siglip" else open_clip.ClipLoss()
    results = []
    for loss in (contrastive_loss(kind, 0, 1), theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
