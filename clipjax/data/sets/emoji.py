"""`emoji`: some 3,800 colour images with their names in fourteen languages, a TensorFlow Datasets builder without TensorFlow.

The system's colour-emoji font draws the images; the names are those of the `emoji` package (Unicode CLDR). Split `test` holds
combinations with a skin tone that `train` never shows. A model that understands the names can compose them.
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
from typing import Any, ClassVar, Protocol

import emoji
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont, features

from clipjax.config import ConfigError
from clipjax.data.storage.remote import is_prepared, upload
from clipjax.files import local_path, scheme

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


class Style(Protocol):
    """A house's drawings of the emoji."""

    kind: ClassVar[str]  # what they come from

    @property
    def version(self) -> str:
        """Its name and release."""
        ...

    def images(self) -> Iterator[tuple[str, Image.Image]]:
        """Every fully-qualified sequence that the house draws, with its image, RGB."""
        ...


@dataclasses.dataclass(frozen=True)
class Font:
    """A colour-emoji font. Raises ConfigError where Pillow can't draw emoji sequences with it."""

    kind: ClassVar[str] = "font"
    path: Path

    def __post_init__(self) -> None:
        if not features.check("raqm"):
            remedy = "install FriBiDi (Debian, Ubuntu: apt-get install libfribidi0; macOS: brew install fribidi)"
            raise ConfigError(f"emoji: Pillow can't join emoji sequences to one image, for it finds no libfribidi: {remedy}")
        if self.draw("😀").convert("HSV").getchannel("S").getbbox() is None:  # no pixel is saturated
            remedy = f"set {FONT_VARIABLE} to one with colour bitmaps, such as Noto Color Emoji (CBDT)"
            raise ConfigError(f"emoji: Pillow draws no colour with {self.path}: {remedy}")

    @property
    def face(self) -> ImageFont.FreeTypeFont:
        """At the font's own pixel size: a font of bitmaps has no other."""
        for size in SIZES:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.RAQM)
        raise ConfigError(f"emoji: {self.path} has no bitmaps of {', '.join(map(str, SIZES))} pixels: set {FONT_VARIABLE}")

    def draw(self, sequence: str, face: ImageFont.FreeTypeFont | None = None) -> Image.Image:
        """The sequence on white, RGB, in the size of one emoji (Noto: 136 x 128)."""
        face = face or self.face
        _, _, width, height = map(int, face.getbbox("😀"))
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((0, 0), sequence, font=face, embedded_color=True)
        return image

    def images(self) -> Iterator[tuple[str, Image.Image]]:
        """Every fully-qualified sequence that the font draws as one glyph, with its image.

        One glyph is as wide as one emoji. A sequence that the font lacks looks like a code point that no font has."""
        face = self.face
        width, missing = face.getlength("😀"), self.draw("\U0010fffd", face).tobytes()
        for sequence, data in emoji.EMOJI_DATA.items():
            if data["status"] == emoji.STATUS["fully_qualified"] and face.getlength(sequence) == width:
                image = self.draw(sequence, face)
                if image.tobytes() != missing:
                    yield sequence, image

    @property
    def version(self) -> str:
        """Family and revision, as `Noto Color Emoji 2.042`, from OpenType's `head` table; of a collection, of its first font."""
        data = self.path.read_bytes()
        (start,) = struct.unpack_from(">I", data, 12) if data[:4] == b"ttcf" else (0,)
        (tables,) = struct.unpack_from(">H", data, start + 4)
        records = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(tables))
        head = next(offset for tag, _, offset, _ in records if tag == b"head")
        return f"{self.face.getname()[0]} {struct.unpack_from('>i', data, head + 4)[0] / 65536:.3f}"


def find_font() -> Font:
    """The font that CLIPJAX_EMOJI_FONT names, else the system's. Raises ConfigError with the remedy if there is none."""
    if chosen := os.environ.get(FONT_VARIABLE):
        path = local_path(FONT_VARIABLE, chosen)
        if not path.is_file():
            raise ConfigError(f"{FONT_VARIABLE} = {chosen!r}: there is no such file; name a colour-emoji font or unset it")
        return Font(path)
    user = Path.home()
    if sys.platform == "darwin":
        folders, name = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), user / "Library/Fonts"], "Apple Color Emoji.ttc"
    else:
        folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), user / ".local/share/fonts", user / ".fonts"]
        name = "NotoColorEmoji*.ttf"
    for folder in folders:
        if found := sorted(folder.rglob(name)):
            return Font(found[0])
    remedy = f"apt-get install fonts-noto-color-emoji (Debian, Ubuntu), or set {FONT_VARIABLE} to the file of a colour-emoji font"
    raise ConfigError(f"emoji: no colour-emoji font {name} in {', '.join(map(str, folders))}: {remedy}")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Images of emoji and their names. `metadata` holds the versions of what drew them and of the `emoji` package."""

    VERSION = tfds.core.Version(VERSION)
    url_infos: Mapping[str, Any] = MappingProxyType({})  # none; tfds would look for them with a package that it does not require

    def __init__(self, *, style: Style, **kwargs: Any) -> None:
        self.style = style
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        self.images = dict(self.style.images())
        source = sources(self.style)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji drawn by {self.style.version}, named by emoji {source['emoji']} in {', '.join(LANGUAGES)}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "caption": tfds.features.Text(doc="the English name"),
                    "captions": tfds.features.Sequence(tfds.features.Text(), doc=f"the names: {', '.join(LANGUAGES)}"),
                    "key": tfds.features.Text(doc="code points in lower-case hex joined by `-`"),
                    "label": tfds.features.ClassLabel(names=sorted(names_of(s)[0] for s in self.images)),
                }
            ),
            metadata=tfds.core.MetadataDict(source),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        for sequence, image in self.images.items():
            if is_test(sequence) == test:
                png = io.BytesIO()
                image.save(png, "png", compress_level=1)  # half the time of the default, and faster to read
                key, names = key_of(sequence), names_of(sequence)
                yield key, {"image": png.getvalue(), "caption": names[0], "captions": names, "key": key, "label": names[0]}


class EmojiTwitter(Emoji):
    """The same as Twitter draws them: the dataset `emoji_twitter`."""


def sources(style: Style) -> dict[str, str]:
    """The versions that the dataset depends on."""
    return {style.kind: style.version, "emoji": emoji.__version__}


def is_current(folder: Path, style: Style) -> bool:
    """Whether the dataset exists and was built from these drawings and this `emoji` package."""
    return is_prepared(folder) and _metadata(folder) == sources(style)


def _metadata(folder: Path) -> dict[str, str]:
    metadata = tfds.builder_from_directory(folder).info.metadata
    return dict(metadata) if isinstance(metadata, dict) else {}


def prepare_emoji(data_dir: Path) -> Path:
    """Builds the dataset `emoji` as `prepare` does. Raises ConfigError if there is no font."""
    return prepare(Emoji, find_font(), data_dir)


def prepare(kind: type[Emoji], style: Style, data_dir: Path) -> Path:
    """Builds a dataset under `data_dir`, local or on gs:// or s3://, unless it is current (`is_current`). Returns its folder.

    The folder appears complete or not at all."""
    folder = data_dir / kind.name / VERSION
    if is_current(folder, style):
        return folder
    emoji.config.load_language()
    tfds.disable_progress_bar()
    beside = None
    if scheme(folder) is None:
        beside = data_dir
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=beside) as scratch:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints
            builder = kind(style=style, data_dir=scratch)
            builder.download_and_prepare(download_dir=Path(scratch, "downloads"))
        _publish(Path(builder.data_dir), folder, style)
    return folder


def _publish(built: Path, folder: Path, style: Style) -> None:
    """Puts a dataset that was built elsewhere in its folder, in place of an outdated one."""
    if scheme(folder):
        upload(built, folder)
        return
    try:
        if folder.exists() and not is_current(folder, style):
            folder.rename(built.with_name("outdated"))
        built.rename(folder)
    except OSError:
        if not is_current(folder, style):  # otherwise another process was first
            raise


def warn_if_outdated(folder: Path) -> None:
    """Logs a warning if this font and package would build another dataset than the stored one. Without a font, none is logged."""
    with contextlib.suppress(ConfigError):
        if not is_current(folder, font := find_font()):
            stored = _metadata(folder)
            log.warning("%s is from %s, not %s: `clipjax data prepare emoji` builds it again", folder, stored, sources(font))
