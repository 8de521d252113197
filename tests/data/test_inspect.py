import json
import re
from dataclasses import replace

import numpy as np
from PIL import Image

from clipjax.config import Data
from clipjax.data import inspect as module
from clipjax.data.images import sheet as sheets
from clipjax.data.images.facts import KINDS
from clipjax.data.inspect import describe, inspect
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from tests.data.conftest import IMAGES, write_tsv


def test_report(images_tsv, tmp_path):
    report = inspect(Data(spec=f"tsv:{images_tsv}"), None, tmp_path / "sheet.png", length=16)
    assert json.loads(json.dumps(report)) == report
    assert report["examples"] == report["examples_looked_at"] == IMAGES
    assert report["width"] == {"min": 40, "median": 40, "max": 40}
    assert report["height"] == {"min": 30, "median": 50, "max": 70}
    assert report["words"] == {"min": 2, "median": 2, "max": 2}
    assert report["characters"] == {"min": 8, "median": 9, "max": 9}
    assert report["captions_per_example"]["max"] == 1
    assert report["fields"] == {"filepath": "text", "title": "text"}
    assert report["truncated_share"] == 0
    assert report["unreadable"] == {}
    assert report["samples"][0] == "number 0"
    assert report["dataset"] == f"tsv:{images_tsv}"
    text = describe(report)
    assert "30 to 70, median 50" in text
    assert "0.00% of the captions at 16 tokens" in text
    assert "sharing one     0 have" in text


def test_the_sheet_is_a_png_whatever_its_name_and_folder(images_tsv, tmp_path):
    inspect(Data(spec=f"tsv:{images_tsv}"), None, tmp_path / "new" / "sheet.of.images")
    with Image.open(tmp_path / "new" / "sheet.of.images") as sheet:
        assert sheet.format == "PNG"


def test_truncation_with_the_runs_own_tokenizer(images_tsv, tmp_path):
    short = Tokenizer.train(["number"], 265, lowercase=True, length=5)
    report = inspect(Data(spec=f"tsv:{images_tsv}"), short, tmp_path / "sheet.png")
    assert report["tokens"] == {"min": 5, "median": 6, "max": 6}  # start, ` number`, space, digits, end
    counted = [short.encode([f"number {i}"])[1][0] for i in range(IMAGES)]
    assert report["truncated_share"] == np.mean(counted) == 31 / 41
    assert report["context_length"] == 5


def test_unreadable_images_are_named(tmp_path, images_tsv):
    (tmp_path / "a.png").write_bytes((images_tsv.parent / "3.png").read_bytes())
    (tmp_path / "b.png").write_text("no image")
    report = inspect(Data(spec=f"tsv:{write_tsv(tmp_path, [('a.png', 'a'), ('b.png', 'b')])}"), None, tmp_path / "sheet.png")
    assert list(report["unreadable"]) == ["b.png"]
    assert "b.png: UnidentifiedImageError" in describe(report)
    assert report["width"]["max"] == 40


def test_captions_that_may_surprise_are_counted(tmp_path, images_tsv):
    image = (images_tsv.parent / "3.png").read_bytes()
    captions = [
        "plain  text",
        "AT&amp;T",
        "fish & chips",
        "it\u2019s",
        "red <|endoftext|> apple",
        "\u200b",
        "&nbsp;",
        "\ufefftwo",
    ]
    for i in range(len(captions)):
        (tmp_path / f"{i}.png").write_bytes(image)
    spec = f"tsv:{write_tsv(tmp_path, [(f'{i}.png', text) for i, text in enumerate(captions)])}"
    report = inspect(Data(spec=spec), None, tmp_path / "sheet.png")
    names = "without_caption", "with_entities", "changed_by_web", "naming_special_tokens"
    assert [report[name] for name in names] == [2, 1, 3, 1]
    text = describe(report)
    assert "no caption      2 have none" in text
    assert "entities        1 captions have HTML entities; 3 change by tokenizer.clean=web" in text
    assert "special tokens  1 captions" in text


def test_what_may_surprise_is_counted(tmp_path):
    """Each example is of the kinds that its file name holds."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in noise]
    exif = Image.Exif()
    exif[274] = 6
    clear = pictures[0].copy()
    clear.putalpha(Image.fromarray(noise[0, :, :, 0]))
    opaque = pictures[1].copy()
    opaque.putalpha(255)
    deep = Image.fromarray(noise[2, :, :, 0].astype(np.uint16) << 8 | 7)
    saved = {
        "rotated.jpg": (pictures[3], {"exif": exif}), "rotated.tif": (pictures[4], {"exif": exif}),
        "transparent.png": (clear, {}), "opaque.png": (opaque, {}), "plain.jpg": (pictures[5], {}),
        "animated.gif": (pictures[6].convert("P"), {"save_all": True, "append_images": [pictures[7].convert("P")]}),
        "deep.png": (deep, {}), "one_coloured.png": (Image.new("RGB", (40, 40), "red"), {}),
        "tiny.png": (Image.fromarray(noise[7, :31]), {}), "huge_one_coloured.png": (Image.new("L", (4097, 4096)), {}),
        "repeated.png": (pictures[8], {}), "repeated.bmp": (pictures[8], {}),
    }  # fmt: skip
    for name, (picture, options) in saved.items():
        picture.save(tmp_path / name, **options)
    (tmp_path / "bad.png").write_bytes((tmp_path / "plain.jpg").read_bytes()[:300])
    report = inspect(Data(spec=f"tsv:{write_tsv(tmp_path, [(n, n) for n in [*saved, 'bad.png']])}"), None, tmp_path / "s.png")
    assert json.loads(json.dumps(report)) == report
    for kind in KINDS:
        expected = [name for name in saved if kind in name]
        assert (report[kind], report["first"][kind]) == (len(expected), expected)
    assert list(report["unreadable"]) == ["bad.png"]
    assert report["width"]["max"] == 4097
    text = describe(report)
    assert re.search(r"rotated +2 turned or mirrored .*: rotated.jpg, rotated.tif\n", text)
    assert re.search(r"one-coloured +2 have one colour: one_coloured.png, huge_one_coloured.png\n", text)


def test_no_image_is_kept(images_tsv, tmp_path, monkeypatch):
    """At any time only the workers hold images."""
    alive, most, record = [], [], Source.record

    class Held(bytes):
        def __del__(self):
            alive.pop()

    def watched(source, i):
        got = record(source, i)
        alive.append(None)
        most.append(len(alive))
        return replace(got, image=Held(got.image.read_bytes()))

    monkeypatch.setattr(Source, "record", watched)
    inspect(Data(spec=f"tsv:{images_tsv}", workers=2), None, tmp_path / "sheet.png")
    assert len(most) >= IMAGES
    assert max(most[:IMAGES]) <= 3


def test_examples_that_share_a_caption_are_counted(tmp_path, images_tsv):
    """Their main ones, as `data.ids` compares them."""
    rows = [("Red dog", "a"), ("a red!", "red dog."), ("blue", "red dog"), ("RED  DOG", ""), ("a (red)", ""), ("five", "")]
    titles = [(f"{i}.png", text) for i, both in enumerate(rows) for text in both if text]
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes())
    report = inspect(Data(spec=f"tsv:{write_tsv(tmp_path, titles)}"), None, tmp_path / "sheet.png")
    assert report["sharing_a_caption"] == 4
    assert "sharing one     4 have" in describe(report)


def test_a_large_dataset_is_sampled(images_tsv, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 11)
    report = inspect(Data(spec=f"tsv:{images_tsv}"), None, tmp_path / "sheet.png")
    assert (report["examples"], report["examples_looked_at"]) == (IMAGES, 11)
    assert report["height"] == {"min": 30, "median": 50, "max": 70}
    assert "the figures below are of 11, evenly spread" in describe(report)


def test_contact_sheet_shows_the_images(emoji_dataset, tmp_path):
    data = Data(spec="emoji", split="test")
    inspect(data, None, tmp_path / "one.png")
    inspect(data, None, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert sheet.shape[1] > 1000
    # In every cell there are colours of its image, and below it dark text on white.
    pitch, top = sheets.CELL + sheets.MARGIN, 46
    height = (sheet.shape[0] - top) // module.GRID
    for row in range(module.GRID):
        for column in range(module.GRID):
            x, y = sheets.MARGIN + column * pitch, top + row * height
            image = sheet[y : y + sheets.CELL, x : x + sheets.CELL]
            text = sheet[y + sheets.CELL + 3 : y + height, x : x + sheets.CELL]
            assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100
            assert text.min() < 120
            assert np.median(text) == 255


def test_long_captions_are_shortened():
    font = sheets.ImageFont.load_default(13)
    lines = sheets._wrap("a very long caption " * 20, font)
    assert len(lines) == sheets.LINES
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= sheets.CELL for line in [*lines, *sheets._wrap("w" * 100, font)])
    assert sheets._wrap("short", font) == ["short"]
