"""The zero-shot classifier against open_clip's, and the sources of names and templates."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from captioned import tiny_clip
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from ssmpretrain.objectives.contrastive.named_classes import class_names, classifier, templates


class AsOpenClip:
    """The text half of a model as `open_clip.build_zero_shot_classifier` calls it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.model.encode_text(tokens) if normalize else self.model.text(tokens)


@pytest.mark.parametrize("kind", ["openai", "simple"])
def test_the_classifier_is_that_of_open_clip(kind: str) -> None:
    model = tiny_clip().eval()
    names = class_names("imagenet", where="test")
    some = [names[number] for number in (0, 1, 134, 517, 639, 999)]
    theirs = open_clip.build_zero_shot_classifier(
        AsOpenClip(model), open_clip.SimpleTokenizer(context_length=16), some,
        OPENAI_IMAGENET_TEMPLATES if kind == "openai" else SIMPLE_IMAGENET_TEMPLATES,
    )  # fmt: skip
    ours = classifier(model.encode_text, model.tokenizer, some, templates(kind, where="test"))
    assert ours.shape == (16, 6) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_classifier_is_the_normalised_mean_of_normalised_sentences() -> None:
    table = {"a": [3.0, 0.0], "b": [0.0, 1.0], "c": [4.0, 4.0], "d": [-1.0, 0.0]}
    vectors = F.normalize(torch.tensor(list(table.values())), dim=-1)
    numbers = {"x a": 0, "y a": 1, "x b": 2, "y b": 3}

    def tokenizer(texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.tensor([[numbers[text]] for text in texts]), torch.zeros(len(texts), dtype=torch.bool)

    found = classifier(lambda tokens: vectors[tokens[:, 0]], tokenizer, ["a", "b"], ["x {}", "y {}"])
    first, second = F.normalize(vectors[0] + vectors[1], dim=0), F.normalize(vectors[2] + vectors[3], dim=0)
    torch.testing.assert_close(found, torch.stack([first, second], dim=1))


def test_many_classes_go_through_the_tower_in_parts_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip().eval()
    names, sentences = [f"thing {number}" for number in range(11)], ["a {}", "the {}", "{}s"]
    whole = classifier(model.encode_text, model.tokenizer, names, sentences)
    monkeypatch.setattr("ssmpretrain.objectives.contrastive.named_classes._TEXTS", 7)
    torch.testing.assert_close(classifier(model.encode_text, model.tokenizer, names, sentences), whole)


def test_imagenet_and_its_templates_are_there_offline() -> None:
    names = class_names("imagenet", where="test")
    assert len(names) == 1000 and names[0] == "tench" and names[-1] == "toilet paper"
    assert len(templates("openai", where="test")) == 80 and len(templates("simple", where="test")) == 7
    assert templates("simple", where="test")[0] == "itap of a {}."
    assert [text.format("x") for text in templates("openai", where="t")] == [t("x") for t in OPENAI_IMAGENET_TEMPLATES]


FILES = {
    "lines.txt": "red fox\ngrey wolf\n北极熊\n",
    "windows.txt": "\ufeffred fox\r\ngrey wolf\r\n北极熊",
    "list.json": '["red fox", "grey wolf", "北极熊"]',
    "labels.json": '{"2": "北极熊", "0": "red fox", "1": "grey wolf"}',
}


@pytest.mark.parametrize("name", FILES)
def test_names_come_from_a_file_in_the_order_of_the_labels(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert class_names(str(tmp_path / name), where="test") == ["red fox", "grey wolf", "北极熊"]


def test_names_come_from_between_commas_or_as_a_list() -> None:
    assert class_names("red fox, grey wolf,bear", where="test") == ["red fox", "grey wolf", "bear"]
    assert class_names(["red, not fox", "bear"], where="test") == ["red, not fox", "bear"]
    many = ",".join(f"a rather long name of class {number}" for number in range(500))
    assert len(class_names(many, where="test")) == 500


def test_templates_come_as_a_sentence_or_from_a_file(tmp_path: Path) -> None:
    assert templates("a photo of a {}, outdoors", where="test") == ["a photo of a {}, outdoors"]
    (tmp_path / "some.txt").write_text("a {}.\nthe {}, a {}\n")
    assert templates(str(tmp_path / "some.txt"), where="test") == ["a {}.", "the {}, a {}"]


WRONG_NAMES = {
    "animals.txt": "there is no file animals.txt",
    "cat": "there is no file cat",
    "cat,,dog": "that of label 1 of 3 is empty",
    "cat.json": "names labels 0 to 1 by {label: name}; label 1 is missing. Number the classes from 0",
    "odd.json": "cat, dog or {label: text}; it holds something else",
    "broken.json": "is no UTF-8 text of classes",
    "latin.txt": "is no UTF-8 text of classes",
    "gap.txt": "that of label 1 of 3 is empty",
    "one.txt": "two classes or more; got 1: cat",
    "none.txt": "two classes or more; got 0: no name",
}


@pytest.mark.parametrize("source", WRONG_NAMES)
def test_names_that_cannot_be_used_get_a_message(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.json").write_text(json.dumps({"0": "cat", "2": "dog"}))
    Path("odd.json").write_text(json.dumps({"0": ["n01", "cat"]}))
    Path("broken.json").write_text('["cat"')
    Path("latin.txt").write_bytes("kätzchen\nhund".encode("latin-1"))
    Path("gap.txt").write_text("cat\n\ndog\n")
    Path("one.txt").write_text("cat\n")
    Path("none.txt").write_text("")
    with pytest.raises(ValueError) as error:
        class_names(source, where="here")
    assert str(error.value).startswith("here: ")
    assert WRONG_NAMES[source].replace("cat, dog or ", "") in str(error.value)


@pytest.mark.parametrize("source", ["a photo of", "a photo, of a", ["a {}", "the"], []])
def test_a_template_without_a_place_for_the_name_gets_a_message(source: Any) -> None:
    with pytest.raises(ValueError, match=r"here: (a template has \{\}|templates come from a file)"):
        templates(source, where="here")
