"""Folders of images with captions beside them, with classes as sub-folders, and with neither."""

import json
import logging
import pickle

import fsspec
import numpy as np
import pytest
from PIL import Image

from clipjax.config import ConfigError, Data, Filter
from clipjax.data.faults import shown
from clipjax.data.formats.locations import divided
from clipjax.data.pipeline import check_source
from clipjax.data.source import bucket
from clipjax.data.sources import open_source
from tests import stores


def opened(folder, **fields):
    return open_source(Data(spec=f"folder:{folder}", **fields))


def picture(path, red=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (red, 0, 0)).save(path, "PNG")


def records(source):
    found = [source.read(i) for i in range(len(source))]
    for record, text in zip(found, source.texts(), strict=True):
        assert (record.key, record.captions, record.label) == (text.key, text.captions, text.label)
        assert text.image == b""
    assert [bucket(record.key) for record in found] == source.buckets().tolist()
    return found


def test_captions_in_text_files(tmp_path):
    for i, name in enumerate(["b", "a", "deep/c.v2", "none"]):
        picture(tmp_path / f"{name}.png", 10 * i)
    (tmp_path / "a.txt").write_text("a caption\n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("ünïcode\r\n")
    (tmp_path / "deep" / "c.v2.TXT").write_text("deep")
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / "alone.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("")
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    found = records(source)
    assert [record.key for record in found] == ["a", "b", "deep/c.v2", "none"]
    assert [record.captions for record in found] == [("a caption",), ("ünïcode",), ("deep",), ()]
    assert found[2].image == tmp_path / "deep" / "c.v2.png"
    assert [int(np.asarray(x.image)[0, 0, 0]) for x in shown(source, range(4))] == [10, 0, 20, 30]
    assert (source.classnames, source.captioned, source.fields) == (None, True, {"image": "file", "txt": "text"})


def test_captions_in_json(tmp_path, caplog):
    for i, meta in enumerate(
        [{"caption": "zero", "alt": ["nil", "none"], "score": 0.5, "kind": "b"}, {"caption": "one", "kind": "a"}]
    ):
        picture(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps(meta))
    picture(tmp_path / "2.png")
    (tmp_path / "2.json").write_text("{cut")
    assert [record.captions for record in opened(tmp_path).texts()] == [("zero",), ("one",), ()]
    number = Filter(number="json.score", at_least=0)
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path, text_field="json.caption=.5,json.alt=.5", filter=number)
        first, second, third = source.texts()
    assert (first.captions, first.chances, first.number) == (("zero", "nil", "none"), (0.5, 0.25, 0.25), 0.5)
    assert (second.captions, second.number) == (("one",), None)
    assert third.captions == ()
    assert "example 2 can't be read: JSONDecodeError" in caplog.text
    (tmp_path / "2.json").write_text("{}")
    source = opened(tmp_path, label_field="json.kind")
    assert source.classnames == ("a", "b")
    assert [record.label for record in records(source)] == [1, 0, -1]
    with pytest.raises(
        ConfigError, match=r"data.text_field = 'txt': is not among the kinds of files beside the images of .*; there are json"
    ):
        opened(tmp_path, text_field="txt")


def test_sub_folders_are_classes(tmp_path):
    for name in ("hot_dog/1.png", "hot_dog/2.JPG", "cat/x/1.png", "train/1.png"):
        picture(tmp_path / name)
    picture(tmp_path / "stray.png")
    source = opened(tmp_path, split="test")  # a class may be called train
    assert source.classnames == ("cat", "hot dog", "train")
    assert [(r.key, r.captions, r.label) for r in records(source)] == [
        ("cat/x/1", ("cat",), 0),
        ("hot_dog/1", ("hot dog",), 1),
        ("hot_dog/2", ("hot dog",), 1),
        ("stray", (), -1),
        ("train/1", ("train",), 2),
    ]


def test_images_alone_and_several_of_one_name(tmp_path):
    for name in ("1.png", "2.png", "2.jpg"):
        picture(tmp_path / name)
    (tmp_path / "2.json").write_text('{"width": 8}')
    source = opened(tmp_path)
    assert not source.captioned
    with pytest.raises(ConfigError, match=r"data.text_field = None: folder:.* has images alone, and training .*; there are im"):
        check_source(source, Data(spec=f"folder:{tmp_path}"), 1)
    assert [record.key for record in records(source)] == ["1", "2.jpg", "2.png"]
    assert source.version != opened(f"{tmp_path}/1.*").version


def test_splits_are_sub_folders(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        picture(tmp_path / name)
    train = opened(tmp_path)
    assert (train.name, train.classnames) == (f"folder:{tmp_path}/train", ("a", "b"))
    assert [record.key for record in records(train)] == ["a/1", "b/2"]
    assert [record.key for record in records(opened(tmp_path, split="validation"))] == ["a/3"]
    assert [record.key for record in opened(tmp_path, split="val").texts()] == ["a/3"]
    with pytest.raises(ConfigError, match=r"data.split = 'test': folder:.* has train, validation, by its sub-folders"):
        opened(tmp_path, split="test")
    assert divided(f"folder:{tmp_path}")
    assert not divided(f"folder:{tmp_path}/train")
    assert opened(f"{tmp_path}/train/", split="test").classnames == ("a", "b")
    with pytest.raises(ConfigError, match=r"data.split = 'val': the sub-folders of folder:.* are no splits; leave it out"):
        opened(f"{tmp_path}/train", split="val")


def test_several_folders(tmp_path):
    for name in ("x/1.png", "y/1.png", "z/1.png"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert {r.key: r.captions for r in records(opened(f"{tmp_path}/x::{tmp_path}/y"))} == {
        "x/1": ("x/1.png",),
        "y/1": ("y/1.png",),
    }
    assert [r.key for r in records(opened(f"{tmp_path}/{{x,z}}"))] == ["x/1", "z/1"]
    assert [r.key for r in records(opened(f"{tmp_path}/x"))] == ["1"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.spec = 'folder:.*nothing': .*nothing does not exist"):
        opened(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"there is no image; name a folder of images"):
        opened(tmp_path)


def test_a_folder_of_a_store(tmp_path):
    with stores.of_this_process("s3"):
        store = fsspec.filesystem("s3")
        for i in range(3):
            picture(tmp_path / f"{i}.png", i)
            store.pipe_file(f"s3://{stores.BUCKET}/some/{i}.png", (tmp_path / f"{i}.png").read_bytes())
            store.pipe_file(f"s3://{stores.BUCKET}/some/{i}.txt", f"number {i}".encode())
        source = opened(f"s3://{stores.BUCKET}/some")
        assert [(r.key, r.captions) for r in records(source)] == [(f"{i}", (f"number {i}",)) for i in range(3)]
        assert source.read(2).image == (tmp_path / "2.png").read_bytes()
