"""Tables of text: as open_clip's tsv, as pandas writes and reads csv, and what stands in a web server's."""

import csv
import gzip
import io
import logging
import pickle
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipjax.config import ConfigError, Data, Filter
from clipjax.data.faults import shown
from clipjax.data.formats.delimited import Delimited
from clipjax.data.sources import open_source
from clipjax.data.storage import store
from tests.data import http_server
from tests.data.conftest import IMAGES, write_tsv


def opened(spec, **fields):
    return open_source(Data(spec=spec, **fields))


def captions_of(source):
    return [record.captions for record in source.texts()]


def test_tsv(images_tsv):
    source = opened(f"tsv:{images_tsv}")
    assert len(source) == IMAGES
    assert source.classnames is None
    (example,) = shown(source, [7])
    assert (example.record.captions, example.record.key, example.record.label) == (("number 7",), "7.png", -1)
    assert (np.asarray(example.image)[..., 0] == 28).all()
    assert list(source.captions())[:2] == ["number 0", "number 1"]
    assert source.text(7).image == b""


def test_rows_of_one_image_are_one_example(tmp_path):
    rows = [("3.png", "three"), ("5.png", "five"), ("3.png", "drei"), ("5.png", ""), ("5.png", "a fifth")]
    source = opened(f"tsv:{write_tsv(tmp_path, rows)}")
    assert captions_of(source) == [("three", "drei"), ("five", "a fifth")]
    assert list(source.captions()) == ["three", "drei", "five", "a fifth"]
    assert source.record(1).image == tmp_path / "5.png"


def test_columns_are_chosen_by_name(tmp_path):
    path = tmp_path / "other.tsv"
    path.write_text("image\ttitle\talt\n0.png\ta\tb\n")
    assert captions_of(opened(f"tsv:{path}", image_field="image", text_field="alt")) == [("b",)]
    with pytest.raises(ConfigError, match=r"data.image_field = 'filepath': is not among the columns .* image, title, alt"):
        opened(f"tsv:{path}")
    with pytest.raises(ConfigError, match=r"data.text_field = 'x': is not among the columns of other.tsv"):
        opened(f"tsv:{path}", image_field="image", text_field="x")


def test_errors_name_file_and_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.spec = 'tsv:.*none.tsv': .*none.tsv does not exist; check the path"):
        opened(f"tsv:{tmp_path}/none.tsv")
    path = write_tsv(tmp_path, [])
    with pytest.raises(ConfigError, match=r"pairs.tsv has a header but no rows"):
        opened(f"tsv:{path}")
    path = write_tsv(tmp_path, [("a.png", "a"), ("b.png", "b", "c")])
    with pytest.raises(ConfigError, match=r"pairs.tsv, line 3: has 3 fields, the header 2, divided by tabs; put a field with"):
        opened(f"tsv:{path}")
    path.write_bytes("filepath\ttitle\na.png\ta\n\nb.png\tcafé\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"pairs.tsv, line 4: is not UTF-8 text \(.* at byte 9\); convert it"):
        opened(f"tsv:{path}")
    path.write_text("filepath\ttitle\na.png\ta\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"pairs.tsv: is UTF-16; save it as UTF-8"):
        opened(f"tsv:{path}")
    path.write_text("filepath,title\na.png,a\n")
    with pytest.raises(
        ConfigError, match=r"data.spec = 'tsv:.*pairs.tsv': the header has no tab; if it is a csv: csv:.*pairs.tsv"
    ):
        opened(f"tsv:{path}")
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is not among the columns of pairs.tsv; there are none"):
        opened(f"tsv:{path}")
    with pytest.raises(ConfigError, match=r"data.split = 'val': tsv:.*pairs.tsv has no splits; leave it out, or take shares"):
        opened(f"tsv:{path}", split="val")


TITLES = {  # as they stand in the file -> as they are read
    "12\" x 9'": "12\" x 9'",
    '"stray': '"stray',
    'stray"': 'stray"',
    '"': '"',
    '"one" and "two"': '"one" and "two"',
    '"a ""quoted"" title"': 'a "quoted" title',  # pandas.DataFrame.to_csv
    '""""': '"',
    "x" * 200_000: "x" * 200_000,
    "b\x85n\u2028l": "b\x85n\u2028l",
}


def test_a_quote_in_a_tsv_hides_no_rows(tmp_path):
    path = write_tsv(tmp_path, [(f"{i}.png", title) for i, title in enumerate(TITLES)])
    assert list(opened(f"tsv:{path}").captions()) == list(TITLES.values())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert list(opened(f"tsv:{path}").captions()) == list(TITLES.values())


ODD = {
    "quotes inside": 'a.png,"one" and "two"\nb.png,12" wide\nc.png,""x\nd.png,y""\ne.png, "z"\n',
    "a quote left open and closed later": 'a.png,"stray\nb.png,c"\n',
    "lines in quotes": '\n\na.png,"b\r\nc"\r\n\r\n"d\ne.png",f',
    "short rows": 'a.png\nb.png,"c\nd"\ne.png,""\n',
    "CR ends a line": "a.png,b\rc.png,d\n",
    "long fields": f'a.png,{"x" * 3_000_000}\nb.png,"{"y" * 200_000}\nz"\nshort.png\n',
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
@pytest.mark.parametrize("separator", [",", "\t"])
def test_what_is_oddly_written_is_read_as_pandas_reads_it(tmp_path, rows, separator):
    text = f"filepath,title\n{rows}".replace(",", separator)
    (tmp_path / "a.csv").write_text(text, newline="")
    read = pd.read_csv(io.StringIO(text, newline=""), sep=separator, dtype=str)
    expected = [(row.filepath, (row.title,) if isinstance(row.title, str) else ()) for row in read.itertuples()]
    assert [(record.key, record.captions) for record in opened(f"csv:{tmp_path}/a.csv").texts()] == expected


PIECES = ["a", " ", ",", ";", "\t", "|", '"', '""', "\n", "\r\n", "\r", "é", "🦊", "NA", "nan", "x" * 30, "'", "\\", "0", "1.5"]


def test_random_tables_are_read_as_pandas_reads_them(tmp_path):
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(1, 6)
        titles = ["".join(rng.choices(PIECES, k=rng.randint(0, 6))) or None for _ in range(n)]
        others = [rng.choice(["q", '"', None, "l\nm"]) for _ in range(n)]
        frame = pd.DataFrame({"filepath": [f"{i}.png" for i in range(n)], "title": titles, "other": others})
        separator, quoting = rng.choice(",;\t|"), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        path = tmp_path / rng.choice(["a.csv", "a.tsv"] if separator == "\t" else ["a.csv"])
        options = dict(sep=separator, quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"]), index=rng.random() < 0.5)
        frame[rng.sample(list(frame.columns), 3)].to_csv(path, **options)
        read = pd.read_csv(path, sep=separator, dtype=str)
        expected = [(row.filepath, row.title if isinstance(row.title, str) else None) for row in read.itertuples()]
        table = Delimited(store.find("", str(path), ())[0], [separator], [], lines_first=path.suffix == ".tsv")
        paths, captions = (column.to_pylist() for column in table.read(["filepath", "title"]))
        assert list(zip(paths, captions, strict=True)) == [(p if isinstance(p, str) else None, t) for p, t in expected]


def test_a_quote_that_nothing_closes_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('filepath,title\na.png,"a\n1"\nb.png,"open\nc.png,c\n')
    with pytest.raises(ConfigError, match=r"a.csv, line 4: a quote opens a field and nothing closes it; double it, or close it"):
        opened(f"csv:{tmp_path}/a.csv")


def test_a_field_of_very_many_lines_is_warned_of(tmp_path, caplog):
    (tmp_path / "a.csv").write_text('filepath,title\na.png,"a' + "\n" * 200 + '"\nb.png,b\n')
    with caplog.at_level(logging.WARNING):
        assert len(opened(f"csv:{tmp_path}/a.csv")) == 2
    assert "a.csv: a field has 200 line ends; is a quote left open?" in caplog.text


def test_a_cr_in_a_line_of_a_tsv_is_a_character(tmp_path):
    path = write_tsv(tmp_path, [("a.png", "one\rtwo"), ("b.png", "three")])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert captions_of(opened(f"tsv:{path}")) == [("one\rtwo",), ("three",)]


FRAME = pd.DataFrame(
    {
        "filepath": ["a.png", "b.png", "c d.png", "a.png", "e.png", None, "ü.png"],
        "title": [
            "plain",
            "a comma, a semicolon; a bar| and\ta tab",
            'two\nlines\r\nand "quotes"',
            " twice",
            None,
            "x",
            "日本 🦊",
        ],
        "class": [1, 2, None, 4, 5, 6, 7],
    }
)


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),  # with the index as the first column, which has no name
        dict(index=False),
        dict(index=False, quoting=csv.QUOTE_ALL, lineterminator="\r\n"),
        dict(index=False, encoding="utf-8-sig", na_rep="NaN"),
        dict(index=False, columns=["class", "title", "filepath"], compression="gzip"),
    ],
    ids=["index", "plain", "quoted", "bom", "gzip"],
)
def test_what_pandas_writes_is_read_as_pandas_reads_it(tmp_path, separator, options):
    for kind in ("csv", "tsv") if separator == "\t" else ("csv",):
        path = tmp_path / f"pairs.{kind}{'.gz' if 'compression' in options else ''}"
        FRAME.to_csv(path, sep=separator, **options)
        source = opened(f"{kind}:{path}", label_field="class")
        read = pd.read_csv(path, sep=separator)  # the reference
        expected = {}
        for number, row in enumerate(read.itertuples()):
            texts = expected.setdefault(row.filepath if isinstance(row.filepath, str) else number, [])
            texts += [row.title] * isinstance(row.title, str)
        assert [list(captions) for captions in captions_of(source)] == list(expected.values())
        assert [r.key for r in source.texts()] == ["a.png", "b.png", "c d.png", "e.png", source.record(4).key, "ü.png"]
        assert [r.label for r in source.texts()] == [1, 2, -1, 5, 6, 7]
        assert source.record(4).image == b""  # no path: a bad example, and no end of the run
        assert source.record(4).key == "row 6"
        assert source.record(3).captions == ()


def test_a_short_row_has_no_last_fields(tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title,note\na.png,a,x\nb.png,b\nc.png\n")
    assert captions_of(opened(f"csv:{tmp_path}/a.csv")) == [("a",), ("b",), ()]


def test_class_names_json_and_a_number(tmp_path):
    (tmp_path / "a.csv").write_text(
        "filepath;title;kind;meta\n"
        'a.png;a;dog;"{""alt"": ""an a"", ""score"": 0.5}"\n'
        'b.png;b;cat;"{""alt"": [""b1"", ""b2""]}"\n'
        "c.png;c;;\n"
        "d.png;d;dog;{not json\n"
    )
    data = Data(
        spec=f"csv:{tmp_path}/a.csv",
        text_field="title=0.8,meta.alt=0.2",
        label_field="kind",
        filter=Filter(number="meta.score", at_least=0.3),
    )
    source = open_source(data)
    assert source.classnames == ("cat", "dog")
    records = list(source.texts())
    assert [r.label for r in records[:3]] == [1, 0, -1]
    assert [r.captions for r in records] == [("a", "an a"), ("b", "b1", "b2"), ("c",), ()]
    assert [r.chances for r in records[:3]] == [pytest.approx((0.8, 0.2)), pytest.approx((0.8, 0.1, 0.1)), None]
    assert [r.number for r in records] == [0.5, None, None, None]
    with pytest.raises(ValueError, match="Expecting property name"):
        source.read(3)  # a cell that is no JSON: the example is bad


def test_several_files_are_one_dataset(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pairs.csv").write_text(f"filepath,title\na.png,{folder} a\n/abs/b.png,{folder} b\n")
    (tmp_path / "x" / "more.csv").write_text("title;filepath\nmore;a.png\n")
    source = opened(f"csv:{tmp_path}/x/*.csv::{tmp_path}/y/pairs.csv")
    expected = {"x/a.png": ("more", "x a"), "/abs/b.png": ("x b", "y b"), "y/a.png": ("y a",)}
    assert {r.key: r.captions for r in source.texts()} == expected
    assert [source.record(i).image for i in (0, 2)] == [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    assert source.version != opened(f"csv:{tmp_path}/x/*.csv").version
    folder = opened(f"csv:{tmp_path}")
    assert {r.key: r.captions for r in folder.texts()} == expected


def test_a_table_of_a_web_server_and_its_images(tmp_path, images_tsv, monkeypatch):
    with http_server.serving(images_tsv.parent) as server:
        source = opened(f"tsv:{server.address}/pairs.tsv")
        assert len(source) == IMAGES
        assert source.text(3).captions == ("number 3",)
        assert {path for path, *_ in server.asked} == {"/pairs.tsv"}
        assert source.read(3).image == (images_tsv.parent / "3.png").read_bytes()
        local = write_tsv(tmp_path, [(f"{server.address}/5.png", "five"), ("here.png", "here")])
        source = opened(f"tsv:{local}")
        assert source.read(0).image == (images_tsv.parent / "5.png").read_bytes()
        assert source.read(1).image == tmp_path / "here.png"


def test_a_table_can_be_pickled_and_read_by_threads(images_tsv):
    source = opened(f"tsv:{images_tsv}")
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda i: copy.read(i % IMAGES), range(400)))
    assert seen == [source.read(i % IMAGES) for i in range(400)]
    assert copy.version == source.version == opened(f"tsv:{images_tsv}", split="test").version


def test_a_cut_off_gzip_is_named(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"filepath,title\n" + bytes(range(97, 120)) * 100)[:-9])
    with pytest.raises(ConfigError, match=r"a.csv.gz: can't be decompressed .* is it cut off\?"):
        opened(f"csv:{tmp_path}/a.csv.gz")


def test_keys_are_paths_and_make_the_buckets(images_tsv):
    source = opened(f"tsv:{images_tsv}")
    assert source.buckets().tolist() == [zlib.crc32(f"{i}.png".encode()) % 100 for i in range(IMAGES)]
    assert Path(str(source.read(0).image)).is_file()
