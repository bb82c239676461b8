"""Byte-pair encoding of long words."""

import random
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer

from ssmpretrain.objectives.contrastive import open_clip_adapter
from ssmpretrain.objectives.contrastive.byte_pairs import merge_pairs


def test_pairs_are_joined_by_rank_and_from_the_left() -> None:
    ranks = {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2, ("d", "d"): 3}
    assert merge_pairs("abcbcddd", ranks) == ["abc", "bc", "dd", "d"]
    assert merge_pairs("x", ranks) == ["x"]
    assert merge_pairs("xyz", {}) == ["x", "y", "z"]


def test_a_rank_is_worked_off_before_a_lower_one_that_it_makes_possible() -> None:
    # Once the first "bc" is there, "bc" and "b" are a pair of lower rank; the second "bc" is joined all the same.
    assert merge_pairs("bcbc", {("b", "c"): 5, ("bc", "b"): 1}) == ["bc", "bc"]


def test_random_words_are_encoded_as_open_clip_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_adapter, "_LONG_WORD", 0)
    ours: Any = open_clip_adapter.Tokenizer()._encoder
    theirs, chance = SimpleTokenizer(), random.Random(0)
    alphabets = ["ab", "etaoinshr", "abcdefghijklmnopqrstuvwxyz", "🐱🐶é", "一只猫坐在窗台上", "-_=+/"]
    for number in range(600):
        letters = alphabets[number % len(alphabets)]
        word = "".join(chance.choice(letters) for _ in range(chance.randint(1, 120)))
        assert ours.encode(word) == theirs.encode(word), word


def test_a_long_word_is_not_remembered() -> None:
    ours: Any = open_clip_adapter.Tokenizer()._encoder
    before = len(ours.cache)
    ours.encode("x" * 100_000)
    assert len(ours.cache) == before
