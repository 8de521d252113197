"""Members and samples found by headers are those of Python's tarfile, for every format; damage is named."""

import io
import tarfile

import numpy as np
import pytest

from clipjax.data.formats import tar
from clipjax.data.formats.tar import Member, TarError, Window

LONG = "folder/" * 30 + "x" * 120 + ".jpg"


def packed(files, fmt=tarfile.PAX_FORMAT, **keywords):
    """A tar of (name, content), in memory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt, **keywords) as file:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def listed(content, piece=4096):
    window = Window(lambda start, length: content[start : start + length], len(content), piece)
    return list(tar.members(window))


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
@pytest.mark.parametrize("piece", [1, 1536, 4096, 1 << 24])
def test_members_are_those_of_tarfile(fmt, piece):
    rng = np.random.default_rng(0)
    long = "d/" * 60 + "n.jpg" if fmt == tarfile.USTAR_FORMAT else LONG
    names = ["a/0.jpg", "./a/0.txt", "ä/1.cls.JSON", long, "plain", "z" * 100]
    files = [(name, rng.bytes(int(rng.integers(3000)))) for name in names] + [("empty.txt", b""), ("block.txt", bytes(512))]
    content = packed(files, fmt)
    found = listed(content, piece)
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        for ours, theirs in zip(found, file.getmembers(), strict=True):
            assert (ours.name.decode(), ours.start, ours.data, ours.size) == (
                theirs.name,
                theirs.offset,
                theirs.offset_data,
                theirs.size,
            )
    assert all(member.plain for member in found)
    assert [a.end for a in found[:-1]] == [b.start for b in found[1:]]


def test_odd_members_are_skipped_and_known():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as file:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("0.jpg", tarfile.LNKTYPE),
            ("1.jpg", tarfile.SYMTYPE),
            ("p", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "l" * 150
            file.addfile(info)
        info = tarfile.TarInfo("2.jpg")
        info.size = 600
        file.addfile(info, io.BytesIO(bytes(600)))
    assert [(m.name, m.plain, m.size) for m in listed(out.getvalue())] == [
        *((name, False, 0) for name in (b"d/", b"0.jpg", b"1.jpg", b"p")),
        (b"2.jpg", True, 600),
    ]


def sealed(header):
    """A header with the right sum."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def test_sparse_members_and_binary_sizes():
    plain = packed([("a.jpg", b"x" * 700), ("b.jpg", b"y")])
    binary = sealed(plain[:124] + b"\x80" + (700).to_bytes(11, "big") + plain[136:512]) + plain[512:]
    assert listed(binary) == listed(plain)
    sparse = sealed(plain[:156] + b"S" + plain[157:482] + b"\1" + plain[483:512])
    maps = [bytes(504) + bytes([more]) + bytes(7) for more in (1, 0)]
    found = listed(sparse + b"".join(maps) + plain[512:])
    assert [(m.name, m.plain, m.data, m.size) for m in found] == [(b"a.jpg", False, 1536, 700), (b"b.jpg", True, 3072, 1)]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"GNU.sparse.of": "all"}) as file:  # which says nothing of a member
        for name, told in (("c.jpg", {"GNU.sparse.name": "real.jpg"}), ("d.jpg", {"size": "5"})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 5, told
            file.addfile(info, io.BytesIO(b"12345"))
    assert [(m.name, m.plain, m.size) for m in listed(out.getvalue())] == [(b"real.jpg", False, 5), (b"d.jpg", True, 5)]


def test_a_negative_size_is_damage():
    plain = packed([("a.jpg", b"x" * 700)])
    for size in (b"-0000001000\0", b"\xff" * 12, b"0000000009\0\0"):
        with pytest.raises(TarError, match="has no header at byte 0: it is damaged"):
            listed(sealed(plain[:124] + size + plain[136:512]) + plain[512:])


def test_what_is_no_whole_tar_is_named():
    whole = packed([("a.jpg", b"x" * 5000), ("a.txt", b"y" * 600)])
    damaged = whole[:5632] + b"?" * 512 + whole[6144:]
    for content, message in {
        whole[:3000]: "ends at byte 3,000, within a member up to byte 5,632: it is cut; fetch it again",
        whole[:5700]: "ends at byte 5,700, within a header: it is cut",
        whole[: 5632 + 512 + 1024]: "ends at byte 7,168 without an end mark: it is cut",
        damaged: "has no header at byte 5,632: it is damaged; fetch it again",
        b"\x1f\x8b" + bytes(900): "is no tar: it is compressed: unpack it with gunzip",
        b"\x28\xb5\x2f\xfd" + bytes(900): "unpack it with unzstd",
        b"PK\3\4" + bytes(900): "it is a zip",
        b"<!DOCTYPE html>": "it is a web page",
        b"version https://git-lfs.github.com/spec/v1\n": "it is a pointer of Git LFS",
        b"": "ends at byte 0 without an end mark",
        whole[:7168] + bytes(2 << 20): "is zeros from byte 7,168 to its end at 2,104,320: its download was cut",
    }.items():
        with pytest.raises(TarError, match=message):
            listed(content)


def test_tars_behind_each_other_are_read_as_one_and_other_things_are_left():
    one, two = packed([("a.jpg", b"x")]), packed([("b.jpg", b"y")])
    assert [m.name for m in listed(one + two + bytes(100_000))] == [b"a.jpg", b"b.jpg"]
    assert [m.name for m in listed(one + b"signature" * 100)] == [b"a.jpg"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000001.jpg", ("000001", "jpg")),
        ("a.b/000001.seg.PNG", ("a.b/000001", "seg.png")),
        ("./a.jpg", ("a", "jpg")),
        ("a", None),
        ("a.", None),
        ("d/.hidden.jpg", None),
        ("__key__.x__", None),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_last_part(name, parts):
    found = tar.split_name(name.encode())
    assert found == (parts and (parts[0].encode(), parts[1]))


def test_samples_are_runs_of_a_key():
    names = ["a.jpg", "a.txt", "d/", "b.jpg", "b.JSON", ".x.jpg", "b.txt", "b.jpg", "a.cls"]
    found = list(tar.runs(Member(name.encode(), i, i, 0, i + 1, name != "b.txt") for i, name in enumerate(names)))
    assert [(r.key, r.start, r.end, r.suffixes) for r in found] == [
        (b"a", 0, 2, ["jpg", "txt"]),
        (b"b", 3, 7, ["jpg", "json"]),
        (b"b", 7, 8, ["jpg"]),
        (b"a", 8, 9, ["cls"]),
    ]


def test_damaged_headers_never_crash():
    """Any byte of a tar changed: the members up to there, or a TarError; never more memory than a name or a header may have."""
    rng = np.random.default_rng(0)
    whole = packed([(f"{n}.{suffix}", rng.bytes(100)) for n in range(5) for suffix in ("jpg", "txt", LONG)], tarfile.PAX_FORMAT)
    names = {m.name for m in listed(whole)}
    outcomes = set()
    for _ in range(3000):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=int(rng.integers(1, 20))):
            content[place] = rng.integers(256)
        try:
            outcomes.add(len({m.name for m in listed(bytes(content[: rng.integers(len(whole))]))} - names) > 0)
        except TarError:
            outcomes.add("error")
    assert "error" in outcomes
