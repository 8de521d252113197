"""Karpathy's splits of COCO and Flickr, in the form of dataset_coco.json and dataset_flickr30k.json."""

import json
from pathlib import Path

import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.source import bucket
from clipjax.data.sources import open_source
from clipjax.data.storage import ranges
from tests.data import hub


def entry(split, number, captions, **more):
    name = f"COCO_{number:012}.jpg"
    sentences = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": i} for i, text in enumerate(captions)]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": number} | more


@pytest.fixture
def coco(tmp_path):
    """A JSON, apart from the images, which are in the folders of COCO."""
    items = [
        entry("train", 1, ["one"], filepath="train2014"),
        entry("test", 2, ["two", " ", "deux", "zwei"], filepath="val2014"),
        entry("restval", 3, ["three"], filepath="val2014"),
        entry("val", 4, ["four"], filepath="val2014"),
        entry("test", 5, [], filepath="val2014"),
    ]
    for item in items:
        path = tmp_path / "images" / item["filepath"] / item["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image %d" % item["imgid"])
    file = tmp_path / "texts/dataset_coco.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"dataset": "coco", "images": items}))
    return file


def opened(patterns, split="test", **fields):
    return open_source(config.Data(spec=f"karpathy:{patterns}", split=split, **fields))


def test_splits_captions_and_images(coco, tmp_path):
    spec = f"{coco}::{tmp_path}/images"
    test = opened(spec)
    assert [record.captions for record in test.texts()] == [("two", "deux", "zwei"), ()]
    assert test.read(0).image.read_bytes() == b"image 2"
    assert test.read(0).key == "COCO_000000000002.jpg"
    assert test.name == f"karpathy:{spec}/test"
    assert test.buckets().tolist() == [bucket(record.key) for record in test.texts()]
    train = opened(spec, "train")
    assert [record.captions for record in train.texts()] == [("one",), ("three",)]  # restval is of train
    assert [train.read(i).image.read_bytes() for i in range(2)] == [b"image 1", b"image 3"]
    assert [opened(spec, split).text(0).captions for split in ("val", "validation")] == [("four",)] * 2
    assert test.version == train.version != ""
    with pytest.raises(ConfigError, match=r"data.split = 'dev2': .* has test, train, val"):
        opened(spec, "dev2")


def test_other_fields(coco, tmp_path):
    source = opened(f"{coco}::{tmp_path}/images", text_field="sentences.tokens", label_field="imgid")
    assert (source.text(0).captions, source.text(0).label, source.classnames) == (("two", "deux", "zwei"), 2, None)
    with pytest.raises(ConfigError, match=r"data.text_field = 'sentence.raw': .*the nearest is sentences"):
        opened(f"{coco}::{tmp_path}/images", text_field="sentence.raw")


def test_images_may_lie_together_beside_the_json(tmp_path):
    item = entry("test", 7, ["seven"])
    (tmp_path / item["filename"]).write_bytes(b"x")
    for name, more in (("flickr", {}), ("coco", {"filepath": "val2014"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": [item | more]}))
        assert opened(tmp_path / f"{name}.json").read(0).image.read_bytes() == b"x"


def test_it_is_read_from_a_store(coco, tmp_path):
    with hub.standing_in():
        base = "hf://datasets/we/coco"
        for path in filter(Path.is_file, tmp_path.rglob("*")):
            ranges.system("hf").pipe_file(f"{base}/{path.relative_to(tmp_path)}", path.read_bytes())
        source = opened(f"{base}/texts/dataset_coco.json::{base}/images")
        assert (source.read(0).image, source.version) == (b"image 2", opened(f"{coco}::{tmp_path}/images").version)
    ranges.forget()


def test_what_is_wrong_is_said(coco, tmp_path):
    with pytest.raises(ConfigError, match=r"no .*texts/val2014/COCO_0+2.jpg; name the folder of the images: karpathy:.*::FOLDER"):
        opened(coco)
    for text in ("[", "{}", '{"images": []}', '{"images": [{"file_name": "coco.jpg"}]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=r"data.spec = .*other.json': must be a Karpathy split: a JSON with images"):
            opened(tmp_path / "other.json")
