"""Zero-shot classes: names, sentences around them, and their embeddings. An image gets the class nearest to it.

Legend: C classes, P templates, E width of the common space
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.contrastive.open_clip_adapter import imagenet_names, imagenet_templates

_TEXTS = 512  # texts that go through the text tower at once
_TEMPLATES = ("openai", "simple")


def class_names(source: str | Sequence[str], *, where: str) -> list[str]:
    """Return the names of the classes, in the order of their labels.

    Args:
        source: One of: "imagenet" for the names of ImageNet-1k; words with commas between them; a text file with one
            name per line; a JSON file with a list of names or {label: name}; a list of the names.
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If the file does not exist or holds something else, or a name is empty.
    """
    if source == "imagenet":
        return imagenet_names()
    names = _listed(source, "classes", where)
    if empty := [label for label, name in enumerate(names) if not name.strip()]:
        raise UserError(f"{where}: every class has a name; that of label {empty[0]} of {len(names)} is empty.")
    if len(names) < 2:
        raise UserError(
            f"{where}: classification needs two classes or more; got {len(names)}: {', '.join(names) or 'no name'}. "
            "Give imagenet, names with commas between them, or a .txt or .json file of names."
        )
    return [name.strip() for name in names]


def templates(source: str | Sequence[str], *, where: str) -> list[str]:
    """Return sentences in which {} stands for the name of a class.

    Args:
        source: One of: "openai" for the 80 sentences that CLIP used for ImageNet; "simple" for the best seven of them;
            one sentence with {}; a file as in `class_names`; a list of the sentences.
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If the file does not exist or holds something else, or a sentence has no {}.
    """
    if isinstance(source, str) and source in _TEMPLATES:
        return imagenet_templates(source)
    sentences = [source] if isinstance(source, str) and "{}" in source else _listed(source, "templates", where)
    without = [sentence for sentence in sentences if "{}" not in sentence]
    if without or not sentences:
        got = repr(without[0]) if without else "no template"
        raise UserError(
            f"{where}: a template has {{}} where the name of the class goes; got {got}. "
            'Give openai, simple, a sentence such as "a photo of a {}.", or a file of such sentences.'
        )
    return sentences


def classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], tuple[Tensor, Tensor]],
    names: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Embed classes: normalise the embeddings of all templates, take their mean, and normalise again.

    Args:
        encode_text: Maps tokens (T, L) to normalised embeddings (T, E).
        tokenizer: Maps texts to tokens (T, L) and flags (T,) that mark cut texts.
        names: C names of classes.
        templates: P sentences with {}.
        device: Device of the tokens for `encode_text`.

    Returns:
        Embeddings as columns, (E, C), float32. The product of normalised image embeddings (B, E) and this matrix is
        the cosine similarity with each class.

    Source: Radford et al., "CLIP" (arXiv:2103.00020), section 3.1.4; open_clip's `build_zero_shot_classifier`.
    """
    columns = []
    at_once = max(1, _TEXTS // len(templates))
    with torch.no_grad():
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            tokens, _ = tokenizer([template.replace("{}", name) for name in some for template in templates])
            embedded = encode_text(tokens.to(device)).float()
            columns.append(F.normalize(embedded.reshape(len(some), len(templates), -1).mean(dim=1), dim=-1))
    return torch.cat(columns).T


class NamedClasses:
    """Classes of a zero-shot classification, given by names that the text tower embeds.

    Args:
        embed: Maps names and templates to embeddings of the classes (E, C), as `classifier` does.
        classes: As in `class_names`.
        sentences: As in `templates`.
        where: Start of error messages, such as the name of a command.

    Attributes:
        names: C names of the classes, in the order of the labels.
        templates: P sentences with {}.

    Raises:
        ValueError: As `class_names` and `templates`.
    """

    def __init__(
        self,
        embed: Callable[[list[str], list[str]], Tensor],
        classes: str | Sequence[str],
        sentences: str | Sequence[str],
        *,
        where: str,
    ) -> None:
        self._embed = embed
        self.names = class_names(classes, where=where)
        self.templates = templates(sentences, where=where)

    def embeddings(self) -> Tensor:
        """Embed the classes with the present weights, as columns (E, C), float32, on the device of the text tower."""
        return self._embed(self.names, self.templates)


def _listed(source: str | Sequence[str], what: str, where: str) -> list[str]:
    """Return a list of names or sentences: the given list, the content of a file, or words split at commas."""
    if not isinstance(source, str):
        return list(source)
    if "," in source and not source.endswith((".txt", ".json")):
        return [part.strip() for part in source.split(",")]
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{where}: {what} come from a file here; there is no file {source}. Check the path.")
    return _in_file(path, what, where)


def _in_file(path: Path, what: str, where: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.strip().splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: {path} is no UTF-8 text of {what} ({error}). Write one a line, or JSON.") from error
    if isinstance(content, dict):
        numbered = [str(label) for label in range(len(content))]
        if set(content) != set(numbered):
            odd = min(set(content) ^ set(numbered), key=lambda key: (len(key), key))
            raise UserError(
                f"{where}: {path} names labels 0 to {len(content) - 1} by {{label: name}}; label {odd} is "
                f"{'missing' if odd in numbered else 'not among them'}. Number the classes from 0."
            )
        content = [content[label] for label in numbered]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{where}: {path} holds {what}, a list of texts or {{label: text}}; it holds something else.")
    return content
