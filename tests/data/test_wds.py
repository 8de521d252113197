"""Tars of samples as a source: img2dataset's layout as webdataset reads it, fields, chunks, labels, and tars that change."""

import gc
import json
import os
import pickle

import numpy as np
import pytest
import webdataset

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.formats import wds
from clipjax.data.source import bucket
from clipjax.data.sources import open_source
from clipjax.data.storage import ranges
from tests.data import http_server, shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shards.img2dataset(tmp_path_factory.mktemp("wds") / "set", shards=3, samples=300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(patterns, **fields):
    return open_source(config.Data(spec=f"wds:{patterns}", **fields))


def written(path, *samples):
    """A tar of samples, each a dict of suffix -> content; its key is its number."""
    return shards.write_tar(path, [(f"{i}.{suffix}", c) for i, sample in enumerate(samples) for suffix, c in sample.items()])


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_samples_are_those_of_webdataset(folder):
    source = opened(folder)
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(source) == len(theirs) == 900
    for i, sample in enumerate(theirs):
        record = source.read(i)
        assert (record.key, record.image) == (sample["__key__"], sample["jpg"])
        assert record.captions == ((sample["txt"].decode(),) if "txt" in sample else ())
    assert source.captioned
    assert source.fields == {"jpg": "image", "json": "json", "txt": "text"}
    assert source.name == f"wds:{folder}"


def test_captions_are_read_without_images(folder, monkeypatch):
    source = opened(folder)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: reads.append(length) or pread(file, length, start))
    monkeypatch.setattr(wds, "HOP", 1536)
    found = list(source.texts())
    assert sum(reads) < 0.9 * sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert [record.captions for record in found] == [() if i % 7 == 6 else (f"number {i}",) for i in range(900)]
    assert found[5] == source.text(5)
    assert not any(record.image for record in found)
    assert list(source.captions())[:7] == [f"number {i}" for i in (0, 1, 2, 3, 4, 5, 7)]


def test_chunks_are_runs_of_a_shard(folder):
    source = opened(folder)
    assert source.chunks().tolist() == [150] * 6
    for chunk, numbers in enumerate(np.split(np.arange(900), 6)):
        fetched = source.fetch(chunk)
        assert fetched.nbytes == sum(map(len, fetched.content.values()))
        for j in (0, 1, 77, 149):
            assert source.record_in(fetched, chunk, j) == source.read(int(numbers[j]))
    again = pickle.loads(pickle.dumps(source))
    assert again.read(400) == source.read(400)
    assert (again.buckets() == source.buckets()).all()


@pytest.mark.parametrize(
    ("counts", "chunks"), [([1], [1]), ([256], [256]), ([257], [128, 129]), ([0, 3, 0, 700], [3, 233, 233, 234])]
)
def test_chunks_have_128_to_256_samples(tmp_path, counts, chunks):
    for number, count in enumerate(counts):
        written(tmp_path / f"{number}.tar", *[{"jpg": b"x", "txt": b"a"}] * count)
    assert opened(tmp_path).chunks().tolist() == chunks


def test_chunks_of_large_samples_have_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(wds, "CHUNK_BYTES", 11_000)
    monkeypatch.setattr(wds, "GAP", 3000)
    samples = [{"jpg": bytes([i]) * 2000} for i in range(8)]
    samples[4:4] = [{"txt": b"left out" * 1000}]
    source = opened(written(tmp_path / "0.tar", *samples))
    assert source.chunks().tolist() == [2, 3, 3]
    pieces = [source.fetch(chunk) for chunk in range(len(source.chunks()))]
    assert max(len(fetched.content) for fetched in pieces) == 2  # the gap is not fetched
    found = [source.record_in(pieces[c], c, j) for c, n in enumerate(source.chunks()) for j in range(n)]
    assert [record.image[:1] for record in found] == [bytes([i]) for i in range(8)]
    assert not source.captioned


def test_fields(folder, tmp_path):
    source = opened(folder, text_field="txt=0.7,json.alt=0.3", filter=config.Filter(number="json.similarity", at_least=0.1))
    assert source.read(5).captions == ("number 5", "alt 5")
    assert source.read(5).chances == (0.7, 0.3)
    assert source.read(5).number == 0.05
    assert (source.read(6).captions, source.read(6).chances) == (("alt 6",), None)
    sample = {"image.png": b"i", "mask.png": b"m", "en.txt": b"\xef\xbb\xbfone\r\n", "de.txt": "eins ß".encode(), "cls": b" 3\n"}
    path = written(tmp_path / "0.tar", sample)
    with pytest.raises(
        ConfigError, match=r"data.image_field = None: several of the suffixes of wds:.*0.tar could be meant: image.png, "
    ):
        opened(path)
    with pytest.raises(ConfigError, match=r"data.text_field = None: several .* could be meant: en.txt, de.txt; name one"):
        opened(path, image_field="mask.png")
    record = opened(path, image_field="mask.png", text_field="en.txt,de.txt").read(0)
    assert (record.image, record.captions, record.label) == (b"m", ("one", "eins ß"), 3)
    with pytest.raises(ConfigError, match=r"data.label_field = 'clss': is not among the suffixes of .*; the nearest is cls"):
        opened(path, image_field="mask.png", text_field="en.txt", label_field="clss")
    with pytest.raises(ConfigError, match=r"data.split = 'val': .* has no splits; leave it out, or take a share: train#0-95"):
        opened(path, split="val")


def test_spellings_of_images_and_captions_in_json_alone(tmp_path):
    about = json.dumps({"caption": ["one", " ", "two"], "label": 7}).encode()
    samples = [{suffix: b"x", "JSON": about} for suffix in ("jpg", "JPEG", "png", "webp")]
    source = opened(written(tmp_path / "0.tar", *samples), label_field="json.label")
    assert [source.read(i).image for i in range(4)] == [b"x"] * 4
    assert (source.read(3).captions, source.read(3).label) == (("one", "two"), 7)
    plain = opened(written(tmp_path / "1.tar", {"jpg": b"x", "json": b'{"width": 3}'}))
    assert not plain.captioned
    with pytest.raises(ConfigError, match=r"none of the suffixes of .* is one of an image \(bin\); name it"):
        opened(written(tmp_path / "2.tar", {"bin": b"x"}))
    assert opened(tmp_path / "2.tar", image_field="bin").read(0).image == b"x"
    with pytest.raises(ConfigError, match=r"has no sample with an image \(left out: 1 no image\)"):
        opened(written(tmp_path / "3.tar", {"txt": b"x"}))


def test_classes_are_named_by_a_file_beside_the_shards(tmp_path):
    (tmp_path / "classnames.txt").write_text("a cat\na dog\n")
    path = written(
        tmp_path / "test/0.tar", {"webp": b"x", "cls": b"1"}, {"webp": b"x", "cls": b"a cat"}, {"webp": b"x", "cls": b"?"}
    )
    source = opened(path, split="test")
    assert source.classnames == ("a cat", "a dog")
    assert [source.read(i).label for i in range(2)] == [1, 0]
    with pytest.raises(ValueError, match="is not among the 2 classes"):
        source.read(2)


def test_names_of_classes_in_a_field(tmp_path):
    samples = [{"jpg": b"x", "cls": b"dog", "json": json.dumps({"kind": name}).encode()} for name in ("cat", "ape", "cat", "")]
    path = written(tmp_path / "0.tar", *samples)
    source = opened(path, label_field="json.kind")
    assert source.classnames == ("ape", "cat")
    assert [source.read(i).label for i in range(4)] == [1, 0, 1, -1]
    plain = opened(path)  # nobody asked for labels, and a name is none
    assert (plain.classnames, plain.read(0).label) == (None, -1)
    numbered = opened(written(tmp_path / "1.tar", {"jpg": b"x", "json": b'{"kind": 2}'}), label_field="json.kind")
    assert (numbered.classnames, numbered.read(0).label) == (None, 2)


def test_splits_of_a_folder_are_not_mixed(tmp_path):
    for name in ("train", "test"):
        written(tmp_path / name / "0.tar", {"jpg": b"x"})
    with pytest.raises(ConfigError, match=rf"has the splits test and train; name one of them: wds:{tmp_path}/train"):
        opened(tmp_path)
    assert len(opened(tmp_path / "train")) == 1
    assert len(opened(f"{tmp_path}/*/0.tar")) == 2  # as it is told to


def test_a_tar_that_changes_while_it_is_read_is_noticed(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4000, 200)
    path = written(tmp_path / "0.tar", *[{"jpg": rng.bytes(n), "txt": b"a"} for n in sizes])
    source = opened(path)
    assert source.read(100).captions == ("a",)
    other = [{"jpg": rng.bytes(n), "txt": b"b"} for n in np.roll(sizes, 1)]
    written(path, *other)
    wrong = [i for i in range(200) if source.record(i).captions == ("b",) and source.record(i).image == other[i]["jpg"]]
    read = [i for i in range(200) if source.record(i).captions]
    assert read == wrong  # only spans that hold the sample of this key
    assert len(read) < 10
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises((OSError, ValueError), match=rf"{path}.*(ends at byte 50,000|has changed since it was indexed)"):
        source.read(199)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)
    assert [record.captions for record in source.texts()] == [()] * 200


def test_a_sample_with_another_key_in_the_same_place_is_noticed(tmp_path):
    def write(key):
        return shards.write_tar(
            tmp_path / "0.tar", [(f"{key(i):03}.{kind}", b"a") for i in range(200) for kind in ("jpg", "txt")]
        )

    source = opened(write(lambda i: i))
    write(lambda i: 199 - i)
    read = [i for i in range(200) if source.record(i).captions]
    assert read == [i for i in range(200) if bucket(f"{i:03}") == bucket(f"{199 - i:03}")]  # one of a hundred or so passes
    assert len(read) < 10


def test_a_web_server_gives_whole_chunks(folder, monkeypatch):
    """Through faults, one request for each chunk, and the same records as here."""
    monkeypatch.setattr(ranges, "DELAYS", (0.01,) * 4)
    local = opened(folder)
    with http_server.serving(folder) as server:
        source = opened(f"{server.address}/{{00000..00002}}.tar")
        assert source.version == local.version
        server.asked.clear()
        server.faults.extend(["cut", "503"])
        fetched = source.fetch(2)
        assert not server.faults
        for j in range(150):
            assert source.record_in(fetched, 2, j) == local.read(300 + j)
        assert server.asked[-1][2] == fetched.nbytes
        assert source.read(3) == local.read(3)
        assert source.text(3) == local.text(3)
        server.asked.clear()
        assert list(source.texts()) == list(local.texts())
        assert len(server.asked) == 6
    ranges.forget()
