"""Headers of valid tars: the reader agrees with Python's tarfile."""

import io
import tarfile
from pathlib import Path

import pytest

from ssmpretrain.datamodules.tar.headers import Member, read_member

NAMES = [
    "a.png",
    "folder/b.cls",
    "x" * 99 + ".p",  # by one letter
    "y" * 100 + ".png",
    f"{'d' * 90}/{'e' * 90}.png",
    f"{'d' * 150}/{'f' * 200}.png",
    "ä b\nc.png",
    "raw\udcff.png",
    "./g.png",
    "h.tar.gz.png",
]
TOO_LONG = (2, 3, 5)  # for a header without an extended one


def members(content: bytes) -> list[Member]:
    found, place = [], 0
    while (member := read_member(lambda start, count: content[start : start + count], place)) is not None:
        found.append(member)
        place = member.end
    return found


def expected(content: bytes) -> list[tuple[str, int, int, int, str]]:
    kinds = {tarfile.REGTYPE: "", tarfile.DIRTYPE: "a folder", tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a link"}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(each.name, each.offset, each.offset_data, each.size, kinds.get(each.type, "a device")) for each in tar]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "for all"}) as tar:
        for number, name in enumerate(NAMES):
            if form == tarfile.USTAR_FORMAT and number in TOO_LONG:
                continue
            info = tarfile.TarInfo(name)
            info.size = number * 300
            info.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0
            info.uname = "ü" * (number % 2)
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        for name, kind in (("d.d", b"5"), ("l.png", b"2"), ("h.png", b"1"), ("c.png", b"3"), ("p.png", b"6")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png" * 30 if form != tarfile.USTAR_FORMAT else "a.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.png"))
    content = file.getvalue()
    found = [(each.name.rstrip("/"), each.offset, each.start, each.size, each.special) for each in members(content)]
    assert found == expected(content)


def test_a_size_of_more_than_octal_digits_hold_and_one_in_a_pax_header_are_read() -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = info.tobuf(form) + bytes(512)
        (member,) = members(content)
        assert (member.size, member.end) == (9 << 30, member.start + (9 << 30))


def test_the_signed_checksum_of_old_programs_is_read() -> None:
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    block[265] = 0xFC  # in the name of the owner
    block[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert members(bytes(block))[0].name == "a.png"


def test_a_header_of_the_seventies_is_read(tmp_path: Path) -> None:
    block = bytearray(tarfile.TarInfo("folder/").tobuf(tarfile.USTAR_FORMAT))
    block[156:345] = bytes(189)  # neither a kind nor a magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert members(bytes(block))[0].special == "a folder"
