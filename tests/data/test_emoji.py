import logging
import shutil
import struct
import zlib
from pathlib import Path

import emoji as package
import numpy as np
import pytest
from PIL import ImageFont

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.faults import shown
from clipjax.data.sets import emoji
from clipjax.data.sources import open_source

TONES = {f"{c:x}" for c in range(0x1F3FB, 0x1F400)}
COUPLE = "1f469-1f3ff-200d-2764-fe0f-200d-1f469-1f3fb"


@pytest.fixture
def train(emoji_dataset):
    return open_source(config.Data(spec="emoji", split="train"))


@pytest.fixture
def test(emoji_dataset):
    return open_source(config.Data(spec="emoji", split="test"))


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty data_dir, and only six emoji in the world: two of them of split `test`."""
    tests = [s for s, data in package.EMOJI_DATA.items() if emoji.is_test(s) and data["status"] == 2 and data["E"] < 12]
    few = ["🚀", "😀", "👍", "🍎", *tests[:2]]
    monkeypatch.setattr(package, "EMOJI_DATA", {s: package.EMOJI_DATA[s] for s in few})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def keys(source):
    return [source.record(i).key for i in range(len(source))]


def test_counts(train, test):
    """With the font and the names of these versions."""
    if emoji.sources(emoji.find_font()) == {"font": "Noto Color Emoji 2.042", "emoji": "2.16.0"}:
        assert (len(train), len(test)) == (3426, 363)
    assert len(train) > 3000
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.12


def test_membership_is_by_skin_tone_and_crc32(train, test):
    for source, expected in ((train, False), (test, True)):
        for key in keys(source):
            toned = not TONES.isdisjoint(key.split("-"))
            assert (toned and zlib.crc32(key.encode()) % 5 == 0) == expected


def test_no_leak_from_train_to_test(train, test):
    assert len({*keys(train), *keys(test)}) == len(train) + len(test)
    assert {*train.captions()}.isdisjoint(test.captions())


def test_test_combines_what_train_has_seen(train, test):
    """Nearly every word of a test name is in a training name, and no full name is."""
    words = {w for c in train.captions() for w in c.split()}
    assert all(w in words for c in test.captions() for w in c.split())


def test_record(test):
    i = keys(test).index(COUPLE)
    (example,) = shown(test, [i])
    assert example.record.captions == ("couple with heart woman woman dark skin tone light skin tone",)
    assert example.image.size == (136, 128)
    assert (np.asarray(example.image)[0, 0] == 255).all()  # white where nothing is drawn
    assert np.ptp(np.asarray(example.image, int), axis=2).max() > 100  # in colour
    assert test.classnames[example.record.label] == "couple with heart woman woman dark skin tone light skin tone"


def test_classes_are_the_names_of_both_splits(train, test):
    assert train.classnames == test.classnames
    assert sorted([*train.captions(), *test.captions()]) == list(train.classnames)
    for source in (train, test):
        assert all(source.classnames[source.record(i).label] == source.record(i).captions[0] for i in range(0, len(source), 7))


def test_captions_in_all_languages(emoji_dataset):
    source = open_source(config.Data(spec="emoji", split="test", text_field="captions"))
    captions = source.record(keys(source).index(COUPLE)).captions
    assert len(captions) == len(emoji.LANGUAGES) == 14
    assert captions[0] == "couple with heart woman woman dark skin tone light skin tone"
    assert captions[emoji.LANGUAGES.index("es")] == "pareja enamorada mujer mujer tono de piel oscuro tono de piel claro"
    assert len(set(captions)) == 14
    assert not any(c.startswith(":") or c.endswith(":") or "_" in c for c in captions)


def test_language_without_a_name_gets_the_english_one(monkeypatch):
    monkeypatch.setitem(package.EMOJI_DATA, "🚀", {"en": ":rocket_ship:", "status": 2, "de": ":rakete:"})
    names = dict(zip(emoji.LANGUAGES, emoji.names_of("🚀"), strict=True))
    assert (names["en"], names["de"], names["fr"]) == ("rocket ship", "rakete", "rocket ship")


def test_one_glyph_only(train, test):
    """A sequence that the font lacks (empty) or draws as several glyphs (wider) is left out."""
    known = {*keys(train), *keys(test)}
    face = emoji.find_font().face
    for sequence, data in package.EMOJI_DATA.items():
        if data["status"] == package.STATUS["fully_qualified"]:
            left, top, right, bottom = face.getbbox(sequence)
            one = right - left == face.getbbox("😀")[2] and bottom > top
            assert (emoji.key_of(sequence) in known) == one


def test_prepare_is_done_once_and_again_when_the_package_changes(few, monkeypatch, caplog):
    assert [len(open_source(config.Data(spec="emoji", split=split))) for split in ("train", "test")] == [4, 2]
    folder = few / "emoji" / emoji.VERSION
    stamp = (folder / "dataset_info.json").stat().st_mtime_ns
    emoji.prepare_emoji(few)
    open_source(config.Data(spec="emoji"))
    assert (folder / "dataset_info.json").stat().st_mtime_ns == stamp
    assert not caplog.records

    monkeypatch.setattr(package, "__version__", "99.0")
    with caplog.at_level(logging.WARNING):
        open_source(config.Data(spec="emoji"))
    assert "'emoji': '99.0'}: `clipjax data prepare emoji` builds it again" in caplog.text
    emoji.prepare_emoji(few)
    assert (folder / "dataset_info.json").stat().st_mtime_ns != stamp
    assert emoji.is_current(folder, emoji.find_font())
    assert [p.name for p in few.iterdir()] == ["emoji"]  # nothing is left of the building


def test_another_process_was_first(few, monkeypatch):
    """Two hosts that share a file system build at once: the second finds the dataset and does not replace it."""
    rename, first = Path.rename, []

    def after_the_other(self, target):
        if not first:
            first.append(target)
            shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", after_the_other)
    folder = emoji.prepare_emoji(few)
    assert first == [folder]
    assert emoji.is_current(folder, emoji.find_font())
    assert [p.name for p in few.iterdir()] == ["emoji"]


def test_failed_build_leaves_nothing(few, monkeypatch):
    def break_off(sequence):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(emoji, "names_of", break_off)
    with pytest.raises(RuntimeError, match="out of ink"):
        emoji.prepare_emoji(few)
    assert not list(few.glob("*/*"))


def test_missing_font(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "rglob", lambda *_: [])
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"no colour-emoji font .* apt-get install fonts-noto-color-emoji .* CLIPJAX_EMOJI_FONT"
    ):
        open_source(config.Data(spec="emoji"))


def test_a_built_dataset_needs_no_font(emoji_dataset, monkeypatch, caplog):
    monkeypatch.setattr(Path, "rglob", lambda *_: [])
    assert len(open_source(config.Data(spec="emoji", split="test"))) > 300
    assert not caplog.records


def test_wrong_font_variable(monkeypatch):
    monkeypatch.setenv(emoji.FONT_VARIABLE, "/nowhere.ttf")
    with pytest.raises(ConfigError, match=r"CLIPJAX_EMOJI_FONT = '/nowhere.ttf': there is no such file"):
        emoji.find_font()


def test_font_without_colour(monkeypatch, tmp_path):
    """Pillow's own font has no emoji at all, and draws a box in black."""
    path = tmp_path / "plain.ttf"
    path.write_bytes(ImageFont.load_default(20).font_bytes)
    monkeypatch.setenv(emoji.FONT_VARIABLE, str(path))
    with pytest.raises(ConfigError, match=r"Pillow draws no colour with .*plain.ttf: set CLIPJAX_EMOJI_FONT"):
        emoji.find_font()


def test_without_fribidi(monkeypatch):
    monkeypatch.setattr(emoji.features, "check", lambda name: False)
    with pytest.raises(ConfigError, match=r"apt-get install libfribidi0"):
        emoji.find_font()


def test_font_version_of_a_collection(tmp_path):
    """The tables of a collection's first font lie where its header says; Apple's font is a collection."""
    plain = ImageFont.load_default(20).font_bytes
    tables = struct.unpack_from(">H", plain, 4)[0]
    header = struct.pack(">4sIII", b"ttcf", 0x10000, 1, 16)
    records = b"".join(
        struct.pack(">4sIII", tag, check, offset + 16, size)
        for tag, check, offset, size in (struct.unpack_from(">4sIII", plain, 12 + 16 * i) for i in range(tables))
    )
    (tmp_path / "one.ttf").write_bytes(plain)
    (tmp_path / "one.ttc").write_bytes(header + plain[:12] + records + plain[12 + 16 * tables :])
    assert version(tmp_path / "one.ttc") == version(tmp_path / "one.ttf")


def version(path):
    font = object.__new__(emoji.Font)  # without its check of colours
    object.__setattr__(font, "path", path)
    return font.version
