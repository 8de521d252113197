"""Sets in CLIP_benchmark's layout: splits, captions a line, several labels, groups, and the files beside the tars."""

import io
from pathlib import Path

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.sources import open_source
from clipjax.data.storage import ranges
from tests.data import http_server, hub, shards

NAMES = "a cat\n\na dog\n"  # a class without a name is still one


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(patterns, **fields):
    return open_source(config.Data(spec=f"wds:{patterns}", **fields))


def by_key(source):
    return {record.key: record for record in map(source.read, range(len(source)))}


def test_splits_are_the_folders_that_count_their_tars(tmp_path):
    root = shards.benchmark(tmp_path / "set", [(b"a%d" % i, i % 3) for i in range(25)], classnames=NAMES)
    shards.benchmark(root, [(b"b", 2)], split="train")
    assert (root / "test/nshards.txt").read_text() == "3\n"
    shards.write_tar(root / "test/3.tar", [("s9.webp", b"x"), ("s9.cls", b"0")])  # no part of it
    source = opened(root, split="test")
    assert source.classnames == ("a cat", "", "a dog")
    assert source.templates is None
    assert not source.multilabel
    found = by_key(source)
    assert [(found[f"s{i:07}"].image, found[f"s{i:07}"].label) for i in range(25)] == [(b"a%d" % i, i % 3) for i in range(25)]
    assert next(iter(source.texts())) == source.text(0)
    assert [record.image for record in by_key(opened(root)).values()] == [b"b"]  # training's default
    assert len(opened(root / "test")) == len(opened(root / "test", split="test")) == 25
    assert len(opened(root, split="test#0-100")) == 25
    (root / "test/1.tar").unlink()
    with pytest.raises(ConfigError, match=r"test/1.tar does not exist"):
        opened(root, split="test")


def test_a_split_that_is_not_there_is_refused(tmp_path):
    root = shards.benchmark(tmp_path / "set", [(b"a", 0)], classnames=NAMES)
    with pytest.raises(ConfigError, match=r"data.split = 'train': .*set has test, by its folders with nshards.txt"):
        opened(root)
    (root / "test/nshards.txt").write_text("two\n")
    with pytest.raises(ConfigError, match=r"nshards.txt = 'two\\n': must hold the number of the tars beside it"):
        opened(root, split="test")
    (root / "test/nshards.txt").unlink()
    (root / "classnames.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"classnames.txt: is not UTF-8 text: convert it"):
        opened(root, split="test")
    (root / "classnames.txt").write_text(NAMES)
    assert len(opened(root, split="test")) == 1  # the folder and the class names tell it, too


def test_each_line_of_a_retrieval_set_is_a_caption(tmp_path):
    texts = ["a cat\na\\nb", "a dog"]
    root = shards.benchmark(tmp_path / "set", [(b"x", text) for text in texts], dataset_type="retrieval\n")
    source = opened(root, split="test")
    assert [source.read(i).captions for i in range(2)] == [("a cat", "a\nb"), ("a dog",)]
    assert (source.captioned, source.classnames) == (True, None)
    plain = shards.benchmark(tmp_path / "plain", [(b"x", texts[0])])
    assert opened(plain, split="test").read(0).captions == (texts[0],)


def test_several_labels(tmp_path):
    rows = np.array([[1, 0, 1], [0, 0, 0]], np.int64)
    facts = dict(classnames=NAMES, dataset_type="multilabel\n", zeroshot_classification_templates="a {c}.\nthe {c}.\n")
    source = opened(shards.benchmark(tmp_path / "set", [(b"x", row) for row in rows], **facts), split="test")
    assert source.multilabel
    assert [(source.text(i).labels, source.read(i).label) for i in range(2)] == [((0, 2), -1), ((), -1)]
    assert source.templates == ("a {c}.", "the {c}.")
    share = opened(tmp_path / "set", split="test#0-100")
    assert (share.multilabel, share.templates, share.read(0)) == (True, source.templates, source.read(0))


def test_numbers_beside_a_class_tell_its_group(tmp_path):
    def npy(values):
        out = io.BytesIO()
        np.save(out, np.array(values))
        return out.getvalue()

    members = [("0.jpg", b"x"), ("0.cls", b"1"), ("0.npy", npy([3, 2016]))]
    others = (npy([0.5]), npy(["x"]), npy(range(4096)), b"no array", b"")
    members += [(f"{i}.{kind}", c) for i, npy in enumerate(others, 1) for kind, c in (("jpg", b"x"), ("cls", b"0"), ("npy", npy))]
    shards.write_tar(tmp_path / "set/test/0.tar", members)
    plain = opened(tmp_path / "set/test")
    assert [plain.read(i).group for i in range(6)] == [None] * 6  # anything may stand there
    (tmp_path / "set/classnames.txt").write_text(NAMES)
    source = opened(tmp_path / "set", split="test")
    assert [(record.label, record.group) for record in source.texts()] == [(1, 3), *[(0, None)] * 5]
    assert opened(tmp_path / "set", split="test", label_field="npy.1").read(0).label == 2016


def test_it_is_read_from_a_web_server_that_lists_nothing(tmp_path):
    root = shards.benchmark(tmp_path / "www/set", [(b"a%d" % i, i % 3) for i in range(15)], classnames=NAMES)
    with http_server.serving(root.parent) as server:
        source = opened(f"{server.address}/set", split="test")
        assert (len(source), source.classnames) == (15, ("a cat", "", "a dog"))
        assert source.read(12).label == 0


def test_it_is_read_from_the_hub(tmp_path):
    root = shards.benchmark(tmp_path / "set", [(b"a%d" % i, i % 3) for i in range(25)], classnames=NAMES)
    with hub.standing_in():
        place = "hf://datasets/clip-benchmark/wds_set"
        for path in filter(Path.is_file, root.rglob("*")):
            ranges.system("hf").pipe_file(f"{place}/{path.relative_to(root)}", path.read_bytes())
        source = opened(place, split="test")
        assert (source.name, source.classnames, len(source)) == (f"wds:{place}", ("a cat", "", "a dog"), 25)
        assert by_key(source)["s0000013"].label == 1
        with pytest.raises(ConfigError, match="has test, by its folders"):
            opened(place)
    ranges.forget()
