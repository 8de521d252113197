"""Members and samples of tars, found by their headers alone: ustar, GNU's and PAX's long names and sizes.

A sample, as in webdataset, is a run of members with the same key: the path up to the *first* dot of its last part. What follows
the dot is the suffix. Members between two of them that have no key (folders, hidden files) do no harm.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
LONGEST = 1 << 20  # bytes that a long name or a PAX header may have
PADDING = 1 << 20  # zeros that may follow the end; more are a download that was cut in a file of the full size
SPACES = 8 * 32  # in the sum of a header, the place of the sum counts as spaces
PLAIN = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: their size counts no bytes
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", b"x", b"g", b"S"
FOREIGN = {  # how a file that is no tar begins, and what to do about it
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "it is compressed: unpack it with unzstd",
    b"\xfd7zXZ": "it is compressed: unpack it with unxz",
    b"BZh": "it is compressed: unpack it with bunzip2",
    b"\x04\x22\x4d\x18": "it is compressed: unpack it with unlz4",
    b"PK\3\4": "it is a zip: pack it again as a tar",
    b"version https://git-lfs": "it is a pointer of Git LFS: fetch the file with git lfs pull",
    b"<": "it is a web page: fetch it again, and look at the page for the reason",
}


class TarError(Exception):
    """A file that is no whole tar. The message says where and what to do."""


class Member(NamedTuple):
    """A file in a tar; bytes count from the beginning of the tar."""

    name: bytes
    start: int  # of its first header
    data: int
    size: int
    end: int  # of its last block
    plain: bool  # its bytes are stored as they are: neither a link nor sparse


class Window:
    """Bytes of a file, of which a piece is held. Called with a position and a number of bytes, it returns them."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, piece: int) -> None:
        """`read(position, length)`: reads a piece, of `piece` bytes or of as many as are asked for. `size`: of the file."""
        self.size, self._read, self._piece = size, read, piece
        self._start, self._held = 0, b""

    @classmethod
    def over(cls, content: bytes) -> "Window":
        """Of bytes that are in memory."""
        made = cls(lambda *_: b"", len(content), 0)
        made._held = content
        return made

    def __call__(self, position: int, length: int) -> bytes:
        begin = position - self._start
        if begin < 0 or begin + length > len(self._held):
            if position + length > self.size:
                raise TarError(f"ends at byte {self.size:,}, before byte {position + length:,}: it is cut; fetch it again")
            self._held = self._read(position, min(max(self._piece, length), self.size - position))
            self._start, begin = position, 0
            if len(self._held) < length:
                raise TarError(f"ends at byte {position + len(self._held):,}, before byte {position + length:,}")
        return self._held[begin : begin + length]


def members(window: Window, *, span: tuple[int, int] | None = None) -> Iterator[Member]:
    """All members in their order: those of the tar, which is cut if it ends without an end mark, or those from the first to the
    last byte of a span.

    Raises TarError at the first header that is none, or where the file ends too early. Tars that stand one behind the other in
    a file are read as one."""
    position, stop = span or (0, window.size)
    ended, ahead = span is not None, _Ahead()
    while position < stop:
        block = window(position, min(BLOCK, stop - position))
        if block == ZEROS and span is None:
            position, ended = _skip_zeros(window, position), True
            continue
        if span is None and ended and not _is_header(block):
            return  # something that stands behind the end
        if not _is_header(block):
            raise TarError(_refusal(block, position))
        ended = span is not None
        start = position if ahead.start is None else ahead.start
        kind, length, data = block[156:157], _number(block[124:136], position), position + BLOCK
        if kind in (LONG_NAME, LONG_LINK, PAX):
            ahead.take(kind, window(data, _short(length, position)), position)
            ahead.start, position = start, data + _padded(length)
            continue
        length = 0 if kind in WITHOUT_DATA else length if ahead.size is None else ahead.size
        data = _after_map(window, block, data) if kind == SPARSE else data
        position = data + _padded(length)
        if data + length > stop:
            raise TarError(f"ends at byte {stop:,}, within a member up to byte {position:,}: it is cut; fetch it again")
        if kind != PAX_GLOBAL:
            yield Member(ahead.name or _name(block), start, data, length, position, kind in PLAIN and not ahead.sparse)
            ahead = _Ahead()
    if not ended:
        raise TarError(f"ends at byte {window.size:,} without an end mark: it is cut; fetch it again")


@dataclass
class _Ahead:
    """What headers before a member's own say of it: GNU's long names, and PAX."""

    start: int | None = None  # of the first of these headers
    name: bytes | None = None
    size: int | None = None
    sparse: bool = False

    def take(self, kind: bytes, text: bytes, position: int) -> None:
        if kind == LONG_NAME:
            self.name = text.rstrip(b"\0")
        elif kind == PAX:
            found = _pax(text, position)
            self.name = found.get(b"GNU.sparse.name") or found.get(b"path") or self.name
            digits = found.get(b"size", b"")
            self.size = int(digits) if digits.isdigit() and len(digits) < 20 else self.size
            self.sparse = self.sparse or any(key.startswith(b"GNU.sparse") for key in found)


def split_name(name: bytes) -> tuple[bytes, str] | None:
    """Key and suffix of a member, the suffix in lower case. None for hidden files, those without a suffix, and `__meta__`."""
    folder, slash, last = name.removeprefix(b"./").rpartition(b"/")
    stem, _, suffix = last.partition(b".")
    if not stem or not suffix or (stem.startswith(b"__") and last.endswith(b"__")):
        return None
    return folder + slash + stem, suffix.decode("utf-8", "replace").lower()


@dataclass
class Run:
    """Members of one key that stand together."""

    key: bytes
    start: int  # of the first byte
    end: int  # of the last member's last block
    suffixes: list[str] = field(default_factory=list)  # of plain members


def runs(found: Iterator[Member]) -> Iterator[Run]:
    """The samples of a tar. A suffix that comes again begins a new one."""
    run = None
    for member in found:
        names = split_name(member.name)
        if names is None or member.name.endswith(b"/"):
            continue
        key, suffix = names
        if run is None or key != run.key or suffix in run.suffixes:
            if run is not None:
                yield run
            run = Run(key, member.start, member.end)
        run.end = member.end
        if member.plain:
            run.suffixes.append(suffix)
    if run is not None:
        yield run


def _is_header(block: bytes) -> bool:
    """Whether the sum of a block's bytes is the one that it holds."""
    if len(block) < BLOCK:
        return False
    try:
        told = _number(block[148:156], 0) - SPACES
    except TarError:
        return False
    place = sum(block[148:156])
    # The lower half of Adler-32 is one more than the sum, mod 65,521, and takes a tenth of the time of `sum`.
    if zlib.adler32(block) & 0xFFFF == 1 + told + place or sum(block) == told + place:
        return True
    signed = struct.unpack("512b", block)  # as some old programs add
    return sum(signed) - sum(signed[148:156]) == told


def _refusal(block: bytes, position: int) -> str:
    """What is wrong where a header should be."""
    cut = f"ends at byte {position + len(block):,}, within a header: it is cut; fetch it again"
    damaged = f"has no header at byte {position:,}: it is damaged; fetch it again"
    return _what_it_is(block, position) or (cut if len(block) < BLOCK else damaged)


def _what_it_is(block: bytes, position: int) -> str:
    if position:
        return ""
    return next((f"is no tar: {remedy}" for sign, remedy in FOREIGN.items() if block.lstrip().startswith(sign)), "")


def _number(text: bytes, position: int) -> int:
    """Octal digits, or GNU's binary numbers, for large ones."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    try:
        number = int(text.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        number = -1
    if number >= 0:
        return number
    digits = text.partition(b"\0")[0].strip()  # other things may stand behind the first zero
    if digits.isdigit() and not set(digits) & set(b"89"):
        return int(digits, 8)
    raise TarError(f"has no header at byte {position:,}: it is damaged; fetch it again")


def _short(length: int, position: int) -> int:
    if length > LONGEST:
        raise TarError(f"has a name of {length:,} bytes at byte {position:,}: it is damaged; fetch it again")
    return length


def _padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU's own header has other things there
        return block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(text: bytes, position: int) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
    found, at = {}, 0
    while at < len(text) and text[at]:
        digits, space, _ = text[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(text) - at:
            raise TarError(f"has a damaged PAX header at byte {position:,}: fetch it again")
        key, _, value = text[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        found[key] = value
        at += int(digits)
    return found


def _after_map(window: Window, block: bytes, data: int) -> int:
    """Where the data of a sparse member of GNU's begin: behind the blocks that go on with its map."""
    more = block[482]
    while more:
        more = window(data, BLOCK)[504]
        data += BLOCK
    return data


def _skip_zeros(window: Window, position: int) -> int:
    """Where zeros end. Raises TarError where far too many stand at the end."""
    begin = position
    while position < window.size:
        piece = window(position, min(1 << 16, window.size - position))
        if rest := piece.lstrip(b"\0"):
            return position + (len(piece) - len(rest)) // BLOCK * BLOCK
        position += len(piece)
    if position - begin > PADDING:
        raise TarError(f"is zeros from byte {begin:,} to its end at {position:,}: its download was cut; fetch it again")
    return position
