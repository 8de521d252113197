"""Parquet files as the Hugging Face hub has them, and others: from this machine and from a web server that fails."""

import io
import json
import logging
import pickle
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from clipjax.config import ConfigError, Data, Filter
from clipjax.data.faults import shown
from clipjax.data.formats import row_groups
from clipjax.data.source import bucket
from clipjax.data.sources import open_source
from clipjax.data.storage.recent import Recent
from tests.data import http_server

N = 23
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NOTES = {
    "image": {"_type": "Image"},
    "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "label": {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"},
}


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (8 + i, 6), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def opened(spec, **fields):
    return open_source(Data(spec=f"parquet:{spec}", **fields))


def write(path, columns, group=5, notes=None):
    table = pa.table(columns)
    if notes:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": notes}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def images(numbers):
    return pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers], IMAGE)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Two files of `train`, with 23 rows in groups of five, and one of `test`, as `datasets` writes them."""
    folder = tmp_path_factory.mktemp("hub")
    pieces = {"train-00000-of-00002": range(12), "train-00001-of-00002": range(12, N), "test-00000-of-00001": range(40, 43)}
    for name, numbers in pieces.items():
        captions = [[f"number {i}", f"again {i}"] if i % 4 else [f"number {i}", None, " "] for i in numbers]
        columns = {"image": images(numbers), "captions": captions, "label": [i % 2 for i in numbers]}
        columns["meta"] = [json.dumps({"alt": f"alt {i}", "score": i / 10}) for i in numbers]
        write(folder / "data" / f"{name}.parquet", columns, notes=NOTES)
    return folder


def test_the_layout_of_the_hub(hub):
    source = opened(hub)
    assert (len(source), source.name) == (N, f"parquet:{hub}/train")
    assert source.classnames == ("tabby cat", "dog")
    assert source.chunks().tolist() == [5, 5, 2, 5, 5, 1]
    assert source.fields["image"].startswith("struct<bytes")
    for example in shown(source, range(N)):
        assert np.asarray(example.image)[0, 0, 0] == 10 * example.number
    expected = [(f"number {i}", f"again {i}") if i % 4 else (f"number {i}",) for i in range(N)]
    for records in (source.texts(), map(source.text, range(N)), map(source.read, range(N))):
        assert [(r.captions, r.label, r.key) for r in records] == [
            (expected[i], i % 2, f"train-0000{i // 12}-of-00002.parquet:{i % 12}") for i in range(N)
        ]
    assert source.text(3).image == b""
    assert [record.key for record in opened(hub, split="test").texts()] == [f"test-00000-of-00001.parquet:{i}" for i in range(3)]


def test_chunks_give_the_same_records(hub):
    source = pickle.loads(pickle.dumps(opened(hub, text_field="meta.alt")))
    fetched = [source.fetch(chunk) for chunk in range(len(source.chunks()))]
    records = [source.record_in(fetched[c], c, j) for c, size in enumerate(source.chunks()) for j in range(size)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(N))) == records
    assert records[7].captions == ("alt 7",)
    assert all(sum(len(png(i)) for i in range(5)) < f.nbytes for f in fetched[:1])
    assert source.buckets().tolist() == [bucket(record.key) for record in records]


def test_fields_probabilities_and_a_number(hub):
    data = Data(
        spec=f"parquet:{hub}/data/train*",
        image_field="image.bytes",
        text_field="captions=0.5,meta.alt=0.5",
        filter=Filter(number="meta.score", at_least=0.3),
    )
    record = open_source(data).read(5)
    assert record.image == png(5)
    assert record.captions == ("number 5", "again 5", "alt 5")
    assert record.chances == pytest.approx((0.25, 0.25, 0.5))
    assert record.number == 0.5
    assert open_source(data).text(5).number == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(split="validation"), r"data.split = 'validation': parquet:.* has test, train, by the names of its files"),
        (
            dict(text_field="caption"),
            r"data.text_field = 'caption': is not among the columns of train-.*parquet; .* nearest is captions",
        ),
        (dict(image_field="image.byte"), r"data.image_field = 'image.byte': image has no byte; there are bytes, path"),
        (dict(text_field="label.a"), r"data.text_field = 'label.a': label has no parts: it is int64, neither a struct nor JSON"),
        (dict(label_field="lable"), r"data.label_field = 'lable': .*; the nearest is label"),
    ],
)
def test_wrong_fields_are_refused_by_name(hub, fields, message):
    with pytest.raises(ConfigError, match=message):
        opened(hub, **fields)


def test_splits_by_names(tmp_path):
    def rows(n):
        return {"image": images(range(n)), "text": ["a"] * n}

    write(tmp_path / "en" / "train" / "0000.parquet", rows(2))
    write(tmp_path / "en" / "val" / "0000.parquet", rows(3))
    write(tmp_path / "train_sft-00000-of-00001-0123456789abcdef.parquet", rows(4))
    assert len(opened(tmp_path)) == 2
    assert len(opened(tmp_path, split="validation")) == 3
    assert len(opened(tmp_path, split="train_sft")) == 4
    write(tmp_path / "mine" / "pairs.parquet", rows(5))
    assert len(opened(tmp_path / "mine")) == len(opened(tmp_path / "mine" / "pairs.parquet", split="test")) == 5
    with pytest.raises(ConfigError, match=r"data.split = 'val': the files of parquet:.* are not called by splits; leave it out"):
        opened(tmp_path / "mine", split="val")


def test_bytes_class_names_and_own_keys(tmp_path):
    columns = {"jpg": [png(i) for i in range(4)], "key": ["w", "x", None, "z"], "kind": ["dog", "cat", "", None]}
    path = write(tmp_path / "a.parquet", columns, group=3)
    source = opened(path, label_field="kind")
    assert source.classnames == ("cat", "dog")
    assert [record.label for record in source.texts()] == [1, 0, -1, -1]
    assert [record.key for record in source.texts()] == ["w", "x", "a.parquet:2", "z"]
    assert source.buckets().tolist() == [bucket(key) for key in ("w", "x", "a.parquet:2", "z")]
    assert (source.captioned, source.read(1).captions) == (True, ("cat",))  # the only text
    alone = opened(write(tmp_path / "b.parquet", {"jpg": [png(1)], "id": [7]}))
    assert (alone.captioned, alone.read(0).key, alone.read(0).image) == (False, "7", png(1))


def test_a_list_of_classes_is_several_labels(tmp_path):
    note = {"feature": NOTES["label"], "_type": "Sequence"}
    for notes in ({"objects": note}, {"objects": [NOTES["label"]]}, {}):
        rows = [[1, 0, 1], [], None] if notes else [["dog", "cat", "dog"], [], None]
        columns = {"image": images(range(3)), "objects": rows, "caption": ["a", "b", "c"]}
        source = opened(write(tmp_path / "a.parquet", columns, notes=notes), label_field="objects")
        assert source.multilabel
        assert source.classnames == (("tabby cat", "dog") if notes else ("cat", "dog"))
        assert [(record.label, record.labels) for record in source.texts()] == [(-1, (0, 1)), (-1, ()), (-1, ())]
    boxes = pa.array([[{"kind": 2}, {"kind": 1}], []], pa.list_(pa.struct({"kind": pa.int64()})))
    path = write(tmp_path / "b.parquet", {"image": images(range(2)), "boxes": boxes})
    assert [record.labels for record in opened(path, label_field="boxes.kind").texts()] == [(1, 2), ()]
    first = opened(path, label_field="boxes.0.kind")
    assert not first.multilabel
    assert [record.label for record in first.texts()] == [2, -1]


def test_a_retrieval_set_with_a_list_of_captions(tmp_path, caplog):
    """The columns of the hub's sets of Flickr and COCO for retrieval."""
    captions = [["one", "a one"], ["two", "", "a two"]]
    facts = {
        "split": ["test"] * 2,
        "filename": ["1.jpg", "2.jpg"],
        "img_id": ["1", "2"],
        "sentids": [["0", "1"], ["2", "3", "4"]],
    }
    path = write(tmp_path / "TEST" / "0000.parquet", {"image": images(range(2)), "caption": captions} | facts)
    for split in ("train", "test"):  # the default of both is all there is
        source = opened(path, split=split)
        assert [record.captions for record in source.texts()] == [("one", "a one"), ("two", "a two")]
        assert [record.key for record in source.texts()] == ["1.jpg", "2.jpg"]
    assert not caplog.text
    opened(write(tmp_path / "all.parquet", {"image": images(range(2)), "caption": captions, "split": ["val", "test"]}))
    assert "all.parquet/train: its column split has test, val, and rows of all of them are taken" in caplog.text


def test_only_classes_are_captions(tmp_path):
    columns = {"img": images(range(3)), "label": [1, 0, -1]}
    source = opened(write(tmp_path / "a.parquet", columns, notes={"label": NOTES["label"]}))
    assert [record.captions for record in source.texts()] == [("dog",), ("tabby cat",), ()]
    assert [record.label for record in source.texts()] == [1, 0, -1]


def test_paths_of_images(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.png").write_bytes(png(1))
    struct = pa.array([{"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}, None], IMAGE)
    source = opened(write(tmp_path / "x" / "a.parquet", {"image": struct, "caption": ["a", "b", "c"]}))
    assert [source.read(i).image for i in range(3)] == [tmp_path / "x" / "1.png", b"", b""]
    source = opened(write(tmp_path / "x" / "b.parquet", {"filepath": ["1.png", None], "caption": ["a", "b"]}))
    assert source.read(0).image == tmp_path / "x" / "1.png"
    assert [record.key for record in source.texts()] == ["1.png", "b.parquet:1"]
    assert source.read(1).image == b""


def test_columns_that_could_be_meant(tmp_path):
    path = write(
        tmp_path / "a.parquet", {"left": images(range(2)), "right": images(range(2)), "one": ["a", "b"], "two": ["c", "d"]}
    )
    with pytest.raises(
        ConfigError, match=r"data.image_field = None: choose a column of a.parquet; there are left \(image\), right"
    ):
        opened(path)
    with pytest.raises(ConfigError, match=r"data.text_field = None: choose a column of a.parquet; there are one \(text\), two"):
        opened(path, image_field="left")
    assert opened(path, image_field="left", text_field="two").read(1).captions == ("d",)
    path = write(tmp_path / "b.parquet", {"size": [1, 2]})
    with pytest.raises(ConfigError, match=r"data.image_field = None: choose a column of b.parquet; there are size \(int64\)"):
        opened(path)


def test_what_is_no_parquet_is_named(hub, tmp_path):
    whole = (hub / "data" / "test-00000-of-00001.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"a.parquet: is no parquet file, or is damaged \(.*\); copy it again, or leave it out"):
        opened(tmp_path)
    write(tmp_path / "a.parquet", {"image": images([]), "caption": pa.array([], pa.string())})
    with pytest.raises(ConfigError, match=r"data.spec = .*: a.parquet has no rows"):
        opened(tmp_path)
    write(tmp_path / "b.parquet", {"image": images([1]), "caption": ["a"]})
    assert len(opened(tmp_path)) == 1
    write(tmp_path / "c.parquet", {"image": images([1]), "title": ["a"]})
    with pytest.raises(ConfigError, match=r"c.parquet: has no column caption, which a.parquet has; name files of one kind"):
        opened(tmp_path)


def test_a_damaged_group_is_bad_examples(tmp_path, caplog):
    path = write(tmp_path / "a.parquet", {"image": images(range(6)), "caption": [f"{i}" for i in range(6)]}, group=2)
    source = opened(path)
    column = parquet.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    assert column.path_in_schema == "caption"
    at = column.dictionary_page_offset or column.data_page_offset
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert [record.captions for record in source.texts()] == [("0",), ("1",), (), (), ("4",), ("5",)]
    assert re.search(
        r"example a.parquet:2 and the 1 after it can't be read: .*a.parquet, row group 1: can't be read", caplog.text
    )
    with pytest.raises(OSError, match=r"a.parquet, row group 1: can't be read"):
        source.read(2)
    assert source.read(1).image == png(1)


def test_a_text_that_is_not_utf8_is_one_bad_example(tmp_path):
    captions = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    source = opened(write(tmp_path / "a.parquet", {"image": images(range(3)), "caption": captions}))
    assert [record.captions for record in source.texts()] == [("a",), (), ("c",)]
    assert [record.key for record in source.texts()] == [f"a.parquet:{i}" for i in range(3)]
    with pytest.raises(UnicodeDecodeError):
        source.read(1)
    assert len(source.buckets()) == 3


def test_damaged_files_never_end_the_process(hub, tmp_path):
    """Bits that are flipped anywhere: the file is refused by name, or examples are bad, and all are counted."""
    whole, rng = (hub / "data" / "test-00000-of-00001.parquet").read_bytes(), random.Random(0)
    refused, bad = 0, 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(content)
        try:
            source = opened(tmp_path / "a.parquet")
        except ConfigError:
            refused += 1
            continue
        assert len(list(source.texts())) == len(source)
        bad += sum(not source.record(i).image for i in range(len(source)))
    assert refused > 5
    assert bad > 5


def test_the_version_is_that_of_the_rows(hub, tmp_path):
    version = opened(hub).version
    assert version == opened(f"{hub}/data/train-*").version
    assert version != opened(hub, split="test").version


def test_single_rows_hold_recent_groups(hub, monkeypatch, caplog):
    monkeypatch.setattr(row_groups, "HELD", 1500)
    source = opened(hub)
    with caplog.at_level(logging.WARNING):
        for i in range(N):
            source.text(i)
        for i in range(N):
            source.read(i)
        assert not caplog.records  # in order, each group is read once
        for i in (0, 20, 1, 21, 2):
            source.read(i)
    assert len(caplog.records) == 1
    assert re.search(
        r"parquet:.*: a row group \(0.0 MB\) is read again for a single row.*; set data.order = windows", caplog.text
    )


def test_groups_that_are_too_large_are_warned_of(hub, monkeypatch, caplog):
    monkeypatch.setattr(row_groups, "LARGE", 300)
    with caplog.at_level(logging.WARNING):
        opened(hub)
    assert "row groups have up to 0.0 GB: each is read as a whole; write the files with smaller ones" in caplog.text


def test_recent_values_are_made_once_and_bounded():
    recent, made = Recent(100), []

    def make(key, size=40):
        made.append(key)
        time.sleep(0.02)
        return key, size

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: recent.get("a", lambda: make("a")), range(8))) == ["a"] * 8
    assert made == ["a"]
    for key in "bac":
        recent.get(key, lambda key=key: make(key))
    assert made == ["a", "b", "c"]
    recent.get("b", lambda: make("b"))  # which was the oldest
    recent.get("huge", lambda: make("huge", 1000))
    assert recent.get("huge", lambda: pytest.fail("it is held")) == "huge"
    with pytest.raises(ZeroDivisionError):
        recent.get("d", lambda: 1 // 0)
    assert recent.get("d", lambda: ("again", 1)) == "again"
    assert pickle.loads(pickle.dumps(recent)).get("d", lambda: ("own", 1)) == "own"
    assert threading.active_count() < 20


def test_a_web_server_is_asked_for_what_is_used(hub):
    with http_server.serving(hub) as server:
        source = opened(f"{server.address}/data/train-{{00000..00001}}-of-00002.parquet")
        server.asked.clear()
        server.faults.extend(["500", "cut"])
        assert source.read(12).image == png(12)
        server.asked.clear()
        assert [r.captions for r in source.texts()] == [r.captions for r in opened(hub).texts()]
        used = sum(size for *_, size in server.asked)
        assert used < 0.3 * sum(path.stat().st_size for path in (hub / "data").glob("train*"))
        with ThreadPoolExecutor(6) as pool:
            fetched = list(pool.map(source.fetch, range(6)))
        assert source.record_in(fetched[4], 4, 1).image == png(18)
