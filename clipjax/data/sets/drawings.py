"""The drawings of the Open Clip Art Library: which of them are taken, and what their captions are.

What is known of each stands in the metadata of its SVG (RDF: Dublin Core and the old vocabulary of Creative Commons).
"""

import hashlib
import html
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from clipjax.data.captions import normalise

TEST_PERCENT = 5
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
SERIES = ("gramastar",)  # title of 1,375 stars that a program drew: their names are numbers
COLLECTION = 3  # a title of so many drawings may be that of their collection
NO_KEYWORDS = ("", "unsorted")
HASH = re.compile(r"\bhash(\(0x[0-9a-f]+\)|$)|\b0x[0-9a-f]{6,}", re.IGNORECASE)  # what a program wrote by mistake
MAX_PIXELS = 16_000_000  # the largest is a road sign of 623 million, in 3 MB
DESCRIBED = 200  # characters of the longest description that is a caption

DC, CC = "{http://purl.org/dc/elements/1.1/}", "{http://web.resource.org/cc/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Metadata:
    """What the SVG of a drawing says of it."""

    path: str  # of the drawing in the collection, without suffix: `animals/birds/owl_01`
    title: str
    keywords: tuple[str, ...]
    description: str
    creator: str
    licence: str


@dataclass(frozen=True)
class Drawing:
    """A picture with its captions."""

    png: Path
    captions: tuple[str, ...]  # the first is the main one
    metadata: Metadata

    @property
    def key(self) -> str:
        """The path with `-` in the place of `/` and `.`: webdataset's keys end at the first dot."""
        return re.sub(r"[/.]", "-", self.metadata.path)

    @property
    def test(self) -> bool:
        """Whether it belongs to split `test`, as `#95-100` of any source means it: crc32 of the key mod 100 is at least 95."""
        return zlib.crc32(self.key.encode()) % 100 >= 100 - TEST_PERCENT


def drawings(collection: Path) -> tuple[list[Drawing], Counter[str]]:
    """The drawings that are taken, by path, and how many are not, by reason. Reads every file once.

    Left out: a drawing whose own metadata does not say that it is in the public domain; SERIES; one without a word for a caption;
    a picture that takes seconds to decode, or is an earlier one's, byte for byte."""
    every = list(_metadata(collection / "svg"))
    titles, descriptions = Counter(m.title for m in every), Counter(m.description for m in every)
    taken, left_out, seen = [], Counter(), set()
    for m in every:
        png = collection / "png" / f"{m.path}.png"
        captions = captions_of(m, titles[m.title], descriptions[m.description])
        picture = png.read_bytes() if png.is_file() else b""
        digest = hashlib.sha256(picture).digest()
        reason = _fault(m, captions, picture) or ("same picture as another" if digest in seen else None)
        if reason:
            left_out[reason] += 1
        else:
            seen.add(digest)
            taken.append(Drawing(png, captions, m))
    return taken, left_out


def _fault(m: Metadata, captions: Sequence[str], picture: bytes) -> str | None:
    if m.licence not in PUBLIC_DOMAIN:
        return "licence not stated as public domain"
    if m.title in SERIES:
        return "drawn by a program, in a series"
    if not captions:
        return "no words"
    if picture[:8] != b"\x89PNG\r\n\x1a\n":
        return "no picture"
    width, height = struct.unpack_from(">II", picture, 16)  # the first chunk of a PNG is its header
    return "more than 16 million pixels" if width * height > MAX_PIXELS else None


def _metadata(folder: Path) -> Iterator[Metadata]:
    """Of every SVG that can be parsed and is no link to another, by path. The first of several `cc:Work` counts."""
    for file in sorted(folder.rglob("*.svg")):
        if file.is_symlink():
            continue
        try:
            work = next(ElementTree.parse(file).iter(f"{CC}Work"), None)
        except ElementTree.ParseError:
            continue
        if work is not None:
            yield _of_work(work, file.relative_to(folder).with_suffix("").as_posix())


def _of_work(work: ElementTree.Element, path: str) -> Metadata:
    def text(name: str) -> str:
        return _plain(work.findtext(name))

    licence = work.find(f"{CC}license")
    keywords = (_plain(li.text).replace("_", " ") for li in work.iter(f"{RDF}li"))
    return Metadata(
        path=path,
        title=text(f"{DC}title"),
        keywords=tuple(dict.fromkeys(word for word in keywords if word.lower() not in NO_KEYWORDS)),
        description=text(f"{DC}description"),
        creator=text(f"{DC}creator/{CC}Agent/{DC}title"),
        licence="" if licence is None else licence.get(f"{RDF}resource", ""),
    )


def _plain(text: str | None) -> str:
    """What a person wrote, on one line."""
    return " ".join(HASH.sub("", html.unescape(text or "")).split())


def captions_of(m: Metadata, same_title: int = 1, same_description: int = 1) -> tuple[str, ...]:
    """The captions of a drawing: what it is, that with its keywords, and its description. () if nothing says what it is.

    What it is: its title; or the words of its file's name, where the title is that of a collection (at least COLLECTION drawings
    have it, as `same_title` says, and it does not stand in the file's name). A description is left out if several drawings have
    it, if it is longer than DESCRIBED characters, if it holds an address, and if it repeats another caption."""
    title = re.sub(r"^Clipart by [^-]* - ", "", m.title).replace("_", " ").strip()
    name = words_of(m.path.rpartition("/")[2])
    if not title or (same_title >= COLLECTION and normalise(title) not in normalise(name)):
        title = name
    if not re.search(r"[^\W\d_]{2}", title):  # two letters
        return ()
    captions = [title]
    if keywords := [word for word in m.keywords if normalise(word) not in normalise(title)]:
        captions.append(", ".join([title, *keywords]))
    said = m.description
    if same_description == 1 and 0 < len(said) <= DESCRIBED and not re.search(r"@|https?:|www\.", said):
        captions.append(said)
    first = {}
    for caption in captions:
        first.setdefault(normalise(caption), caption)
    return tuple(first.values())


def words_of(name: str) -> str:
    """The words of a file's name, without the number of a version: `folderOpen_blue-02` is `folder Open blue`."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    words = re.sub(r"[\W_]+", " ", words).strip()
    return re.sub(r"( 0\d)+$", "", words)
