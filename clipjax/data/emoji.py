"""`emoji`: some 3,800 colour pictures with their names in fourteen languages, a TensorFlow Datasets builder without TensorFlow.

The pictures are what the system's colour-emoji font draws, the names those of the `emoji` package (Unicode CLDR). Split `test`
holds combinations with a skin tone that `train` never shows, so that a model which understands names can compose them.
"""

import contextlib
import dataclasses
import io
import logging
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import emoji
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont, features

from clipjax.config import ConfigError

FONT_VARIABLE = "CLIPJAX_EMOJI_FONT"
SIZES = (109, 160, 96)  # pixel sizes of the bitmaps in Noto Color Emoji (CBDT) and Apple Color Emoji (sbix)
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
LANGUAGES = tuple(emoji.LANGUAGES)  # English first
VERSION = "1.0.0"

log = logging.getLogger(__name__)


def key_of(sequence: str) -> str:
    """The code points in lower-case hex joined by `-`: `1f44d-1f3ff`."""
    return "-".join(f"{ord(c):x}" for c in sequence)


def is_test(sequence: str) -> bool:
    """Whether a sequence belongs to split `test`: it has a skin tone, and the CRC-32 of its key is a multiple of 5."""
    return not SKIN_TONES.isdisjoint(sequence) and zlib.crc32(key_of(sequence).encode()) % 5 == 0


def names_of(sequence: str) -> list[str]:
    """Its names as plain words, one for each of LANGUAGES; English where a language has none."""
    names = emoji.EMOJI_DATA[sequence]
    return [names.get(language, names["en"]).strip(":").replace("_", " ") for language in LANGUAGES]


@dataclasses.dataclass(frozen=True)
class Font:
    """A colour-emoji font. Raises ConfigError where Pillow can't draw emoji sequences with it."""

    path: Path

    def __post_init__(self) -> None:
        if not features.check("raqm"):
            remedy = "install FriBiDi (Debian, Ubuntu: apt-get install libfribidi0; macOS: brew install fribidi)"
            raise ConfigError(f"emoji: Pillow can't join emoji sequences to one picture, for it finds no libfribidi: {remedy}")
        if self.draw("😀").convert("HSV").getextrema()[1][1] == 0:
            remedy = f"set {FONT_VARIABLE} to one with colour bitmaps, such as Noto Color Emoji (CBDT)"
            raise ConfigError(f"emoji: Pillow draws no colour with {self.path}: {remedy}")

    @property
    def face(self) -> ImageFont.FreeTypeFont:
        """At the font's own pixel size: bitmaps have no other."""
        for size in SIZES:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.RAQM)
        raise ConfigError(f"emoji: {self.path} has no bitmaps of {', '.join(map(str, SIZES))} pixels: set {FONT_VARIABLE}")

    def draw(self, sequence: str, face: ImageFont.FreeTypeFont | None = None) -> Image.Image:
        """The sequence on white, RGB, in the size of one picture (Noto: 136 x 128)."""
        face = face or self.face
        picture = Image.new("RGB", tuple(map(int, face.getbbox("😀")[2:])), "white")
        ImageDraw.Draw(picture).text((0, 0), sequence, font=face, embedded_color=True)
        return picture

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Every fully-qualified sequence that is drawn as one glyph, with its picture.

        One glyph is as wide as one emoji; what the font lacks looks like a code point that no font has."""
        face = self.face
        width, missing = face.getlength("😀"), self.draw("\U0010fffd", face).tobytes()
        for sequence, data in emoji.EMOJI_DATA.items():
            if data["status"] == emoji.STATUS["fully_qualified"] and face.getlength(sequence) == width:
                picture = self.draw(sequence, face)
                if picture.tobytes() != missing:
                    yield sequence, picture

    @property
    def version(self) -> str:
        """Family and revision, as `Noto Color Emoji 2.042`: OpenType's `head` table, of a collection that of the first font."""
        data = self.path.read_bytes()
        (start,) = struct.unpack_from(">I", data, 12) if data[:4] == b"ttcf" else (0,)
        (tables,) = struct.unpack_from(">H", data, start + 4)
        records = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(tables))
        head = next(offset for tag, _, offset, _ in records if tag == b"head")
        return f"{self.face.getname()[0]} {struct.unpack_from('>i', data, head + 4)[0] / 65536:.3f}"


def find_font() -> Font:
    """The font that CLIPJAX_EMOJI_FONT names, or else the system's. Raises ConfigError with the remedy where there is none."""
    if chosen := os.environ.get(FONT_VARIABLE):
        if not Path(chosen).is_file():
            raise ConfigError(f"{FONT_VARIABLE} = {chosen!r}: there is no such file; name a colour-emoji font or unset it")
        return Font(Path(chosen))
    home = Path.home()
    if sys.platform == "darwin":
        folders, name = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"], "Apple Color Emoji.ttc"
    else:
        folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts", home / ".fonts"]
        name = "NotoColorEmoji*.ttf"
    for folder in folders:
        if found := sorted(folder.rglob(name)):
            return Font(found[0])
    remedy = f"apt-get install fonts-noto-color-emoji (Debian, Ubuntu), or set {FONT_VARIABLE} to the file of a colour-emoji font"
    raise ConfigError(f"emoji: no colour-emoji font {name} in {', '.join(map(str, folders))}: {remedy}")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Pictures of emoji and their names. `metadata` tells which font and which `emoji` package they came from."""

    VERSION = tfds.core.Version(VERSION)
    url_infos: Mapping[str, Any] = MappingProxyType({})  # none; tfds would look for them with a package it doesn't require

    def __init__(self, *, font: Font, **kwargs: Any) -> None:
        self.font = font
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        self.drawn = dict(self.font.pictures())
        source = sources(self.font)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji drawn by {source['font']}, named by emoji {source['emoji']} in {', '.join(LANGUAGES)}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "caption": tfds.features.Text(doc="the English name"),
                    "captions": tfds.features.Sequence(tfds.features.Text(), doc=f"the names: {', '.join(LANGUAGES)}"),
                    "key": tfds.features.Text(doc="code points in lower-case hex joined by `-`"),
                    "label": tfds.features.ClassLabel(names=sorted(names_of(s)[0] for s in self.drawn)),
                }
            ),
            metadata=tfds.core.MetadataDict(source),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        for sequence, picture in self.drawn.items():
            if is_test(sequence) == test:
                png = io.BytesIO()
                picture.save(png, "png", compress_level=1)  # half the time of the default, and quicker to read
                key, names = key_of(sequence), names_of(sequence)
                yield key, {"image": png.getvalue(), "caption": names[0], "captions": names, "key": key, "label": names[0]}


def sources(font: Font) -> dict[str, str]:
    """The versions that the dataset depends on."""
    return {"font": font.version, "emoji": emoji.__version__}


def is_current(folder: Path, font: Font) -> bool:
    """Whether the dataset is there, from this font and this `emoji` package."""
    return folder.exists() and dict(tfds.builder_from_directory(folder).info.metadata) == sources(font)


def prepare_emoji(data_dir: Path) -> Path:
    """Builds the dataset under `data_dir`, unless it is there from this font and package. Returns the dataset's folder.

    It appears whole or not at all. Raises ConfigError where there is no font."""
    font, folder = find_font(), data_dir / "emoji" / VERSION
    if is_current(folder, font):
        return folder
    emoji.config.load_language()
    tfds.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=data_dir) as scratch:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints
            builder = Emoji(font=font, data_dir=scratch)
            builder.download_and_prepare(download_dir=Path(scratch, "downloads"))
        try:
            if folder.exists() and not is_current(folder, font):
                folder.rename(Path(scratch, "outdated"))
            Path(builder.data_dir).rename(folder)
        except OSError:
            if not is_current(folder, font):  # else another process was first
                raise
    return folder


def warn_if_outdated(folder: Path) -> None:
    """Logs a warning if the stored dataset is not what this font and package would give. Without a font it can't be outdated."""
    with contextlib.suppress(ConfigError):
        if not is_current(folder, font := find_font()):
            before = dict(tfds.builder_from_directory(folder).info.metadata)
            log.warning("%s is from %s, not %s: `clipjax data prepare emoji` builds it again", folder, before, sources(font))
