"""The captions of one raw sample."""

import json
from typing import Any

import pytest

from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.labels.captions import Captions


def captions(raw: dict[str, Any], caption: str | list[str] = "txt") -> list[str]:
    return Captions(caption, "here").of({"__key__": "a", "__url__": "b.tar", "png": b"", **raw})


def fault(raw: dict[str, Any], caption: str | list[str] = "txt") -> tuple[str, str]:
    with pytest.raises(BadSample) as caught:
        captions(raw, caption)
    return caught.value.cause, caught.value.detail


@pytest.mark.parametrize(
    "text",
    [
        "a red square",
        "家猫坐在垫子上",
        "кошка на коврике",
        "แมวนั่งอยู่บนเสื่อ",
        "قطة على السجادة",
        "a 👩‍👩‍👧 with a 🏳️‍🌈 and two 🇺🇦",  # zero-width joiners and variation selectors
        "cafe\u0301 in two characters, café in one",
        "two\nlines\twith  inner   space",
        "&amp; is not ours to decode",
        "x" * 10_000,
        "0",
    ],
)
def test_a_caption_is_the_text_as_it_is(text: str) -> None:
    assert captions({"txt": text.encode()}) == [text]
    assert captions({"json": json.dumps({"caption": text}).encode()}, "json.caption") == [text]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b" \r\n a cat\t\n", "a cat"),
        ("\u3000a cat\u00a0".encode(), "a cat"),
        (b"a\0 cat\x07\x7f\0", "a cat"),
        (b"a cat\0", "a cat"),
        (b"a\nb\n", "a\nb"),
        ("a\x85b\x9fc".encode(), "a\x85bc"),
    ],
)
def test_marks_control_characters_and_white_space_at_the_ends_are_dropped(content: bytes, text: str) -> None:
    assert captions({"txt": content}) == [text]


@pytest.mark.parametrize("content", [b"", b" \n\t ", b"\0\0\0\0", b"\xef\xbb\xbf", "\u200b\u2060".encode(), b"\x01"])
def test_a_caption_without_anything_to_read_is_empty(content: bytes) -> None:
    assert fault({"txt": content}) == ("empty captions", "txt")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("caf\xe9".encode("latin-1"), "txt: byte 3 is 0xe9"),
        (b"\xef\xbb\xbfcaf\xe9", "txt: byte 6 is 0xe9"),
        (b"\xe4\xb8\xad \xe4\xb8", "txt: byte 4 is 0xe4"),
        ("a cat".encode("utf-16"), "txt: byte 0 is 0xff"),
        ("家猫".encode("gb18030"), "txt: byte 0 is 0xbc"),
        ("a cat".encode("utf-16-le"), "txt: every second byte is a control character, as in UTF-16"),
        ("кошка".encode("utf-16-le"), "txt: every second byte is a control character, as in UTF-16"),
        ("แมว ๑".encode("utf-16-be"), "txt: every second byte is a control character, as in UTF-16"),
    ],
)
def test_text_in_another_encoding_is_told_by_its_bytes(content: bytes, detail: str) -> None:
    assert fault({"txt": content}) == ("captions that are not UTF-8", detail)


def test_half_a_surrogate_pair_in_json_is_no_text() -> None:
    cause, detail = fault({"json": rb'{"caption": "a \ud83d"}'}, "json.caption")
    assert (cause, detail) == ("captions that are not UTF-8", "json.caption: half a surrogate pair")
    assert captions({"json": rb'{"caption": "a \ud83d\udc08"}'}, "json.caption") == ["a 🐈"]


def test_a_caption_of_a_million_characters_is_no_caption() -> None:
    assert fault({"txt": b"x" * 1_000_001}) == ("giant captions", "txt: 1,000,001 characters")


def test_a_missing_caption_tells_what_there_is() -> None:
    assert fault({"cls": b"1"}) == ("samples without a caption", "no txt; fields: cls, png")
    content = {"json": b'{"url": "x", "alt": {"en": "y"}}'}
    assert fault(content, "json.caption")[1] == "no 'caption' for json.caption; it has: url, alt"
    assert fault(content, "json.alt.de")[1] == "no 'de' for json.alt.de; it has: en"
    for nothing in (b"null", b"[]"):
        cause, detail = fault({"json": b'{"caption": ' + nothing + b"}"}, "json.caption")
        assert (cause, detail) == ("samples without a caption", f"json.caption is {nothing.decode()}")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"caption": 5}', "json.caption: expected a string; got 5"),
        (b'{"caption": {"en": "a"}}', 'json.caption: expected a string; got {"en": "a"}'),
        (b'["a cat"]', "json.caption: expected an object with 'caption'; got [\"a cat\"]"),
        (b'{"caption": "a', "json: Unterminated string starting at: line 1 column 13 (char 12)"),
        (b"", "json: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "json: maximum recursion depth exceeded"),
    ],
)
def test_json_that_cannot_be_used_is_a_bad_caption(content: bytes, detail: str) -> None:
    cause, told = fault({"json": content}, "json.caption")
    assert cause == "bad captions" and told.startswith(detail)


@pytest.mark.parametrize(
    ("caption", "raw", "expected"),
    [
        ("json.a.b", {"json": b'{"a": {"b": "deep"}}'}, ["deep"]),
        ("json.Caption", {"json": b'{"Caption": "case counts", "caption": "other"}'}, ["case counts"]),
        ("json.c", {"json": b'\xef\xbb\xbf{"c": ["one", "two"]}'}, ["one", "two"]),
        ("json", {"json": b'["one", "two"]'}, ["one", "two"]),
        ("caption.txt", {"caption.txt": b"by its full name", "txt": b"no"}, ["by its full name"]),
        ("TXT", {"txt": b"as webdataset reads names"}, ["as webdataset reads names"]),
        ("meta.json.c", {"meta.json": b'{"c": "in another member"}'}, ["in another member"]),
        (["txt", "json.c"], {"txt": b"one", "json": b'{"c": ["two", "three"]}'}, ["one", "two", "three"]),
        (["json.c", "txt"], {"txt": b"one"}, ["one"]),
    ],
)
def test_captions_come_from_the_fields_that_are_named(caption: Any, raw: dict[str, bytes], expected: list[str]) -> None:
    assert captions(raw, caption) == expected


def test_of_several_captions_the_unusable_ones_are_left_out() -> None:
    raw = {"txt": b"\xff", "json": b'{"c": ["", "good", 5, "too"]}'}
    usable, faults = Captions(["txt", "json.c", "json.d"], "here").sort(raw)
    assert usable == captions(raw, ["txt", "json.c"]) == ["good", "too"]
    assert [fault.cause for fault in faults] == [
        "captions that are not UTF-8",
        "empty captions",
        "bad captions",
    ]


def test_where_no_caption_is_usable_a_fault_counts_before_a_lack() -> None:
    assert fault({"json": b'{"c": ""}'}, ["txt", "json.c"])[0] == "empty captions"
    assert fault({}, ["txt", "json.c"]) == ("samples without a caption", "no txt; fields: png")


@pytest.mark.parametrize("caption", ["", [], "json.", ".txt", ["txt", ""], "a..b", [5]])
def test_a_caption_that_names_nothing_is_refused(caption: Any) -> None:
    with pytest.raises(ValueError, match=r"^here: caption is an extension, json\.FIELD or a list of these; got "):
        Captions(caption, "here")
