"""The same forty pictures from every kind of source."""

import dataclasses
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from clipjax import config
from clipjax.config import Data
from clipjax.data.faults import shown
from clipjax.data.pipeline import train_batches
from clipjax.data.sources import open_source
from clipjax.data.storage import ranges
from tests.data import hub
from tests.data.conftest import IMAGES

N = IMAGES - 1


def captions(i):
    return [f"number {i}", f"nummer {i}"][: 1 + i % 2]


@pytest.fixture(scope="module")
def kinds(images_tsv, tmp_path_factory):
    """The SPEC of each kind. Their files name the pictures so that all have the same order: 00, 01, ..."""
    root = tmp_path_factory.mktemp("kinds")
    content = {f"{i:02}": (images_tsv.parent / f"{i}.png").read_bytes() for i in range(N)}
    for folder in ("folder", "tables/images", "wds", "parquet"):
        (root / folder).mkdir(parents=True)
    for i, (key, png) in enumerate(content.items()):
        (root / "tables" / "images" / f"{key}.png").write_bytes(png)
        (root / "folder" / f"{key}.png").write_bytes(png)
        (root / "folder" / f"{key}.json").write_text(json.dumps({"caption": captions(i), "class": i % 3}))
    rows = [(f"images/{key}.png", text, i % 3) for i, key in enumerate(content) for text in captions(i)]
    frame = pd.DataFrame(rows, columns=["filepath", "title", "class"])
    frame.to_csv(root / "tables" / "pairs.csv")
    frame.to_csv(root / "tables" / "pairs.tsv", sep="\t", index=False)
    images = pa.array([{"bytes": png, "path": f"{key}.png"} for key, png in content.items()])
    table = pa.table({"image": images, "caption": [captions(i) for i in range(N)], "class": [i % 3 for i in range(N)]})
    for number, part in enumerate((table[:25], table[25:])):
        parquet.write_table(part, root / "parquet" / f"train-{number:05}-of-00002.parquet", row_group_size=7)
    for number, keys in enumerate((sorted(content)[:15], sorted(content)[15:])):
        with tarfile.open(root / "wds" / f"{number:05}.tar", "w") as tar:
            for key in keys:
                tar.add(root / "folder" / f"{key}.png", f"{key}.png")
                tar.add(root / "folder" / f"{key}.json", f"{key}.json")
    about = [
        {"filename": f"{key}.png", "split": "train", "sentences": [{"raw": text} for text in captions(i)], "class": i % 3}
        for i, key in enumerate(content)
    ]
    (root / "karpathy.json").write_text(json.dumps({"images": about}))
    return {
        "tsv": Data(spec=f"tsv:{root}/tables/pairs.tsv", label_field="class"),
        "csv": Data(spec=f"csv:{root}/tables/pairs.csv", label_field="class"),
        "parquet": Data(spec=f"parquet:{root}/parquet", label_field="class"),
        "folder": Data(spec=f"folder:{root}/folder", label_field="json.class"),
        "wds": Data(spec=f"wds:{root}/wds", label_field="json.class", index=str(root / "index")),
        "karpathy": Data(spec=f"karpathy:{root}/karpathy.json::{root}/folder", label_field="class"),
    }


def test_tables_parquet_and_folders_of_a_store(kinds, tmp_path):
    with hub.standing_in():
        base, put = "hf://datasets/we/pairs", ranges.system("hf").pipe_file
        local = Path(kinds["parquet"].spec.partition(":")[2])
        for path in local.iterdir():
            put(f"{base}/parquet/data/{path.name}", path.read_bytes())
        stored = open_source(dataclasses.replace(kinds["parquet"], spec=f"parquet:{base}/parquet"))
        here = open_source(kinds["parquet"])
        assert list(stored.texts()) == list(here.texts())
        assert (stored.read(7), stored.version) == (here.read(7), here.version)
        put(f"{base}/tables/pairs.csv", b'filepath,title\nimages/1.png,one\nimages/2.png,"t,wo"\n')
        put(f"{base}/tables/images/2.png", b"png")
        table = open_source(Data(spec=f"csv:{base}/tables/*.csv"))
        assert (table.read(1).image, table.text(0).captions) == (b"png", ("one",))
        with pytest.raises(FileNotFoundError, match=r"hf://datasets/we/pairs/tables/images/1.png"):
            table.read(0)
        (tmp_path / "pairs.csv").write_text(f"filepath,title\n{base}/tables/images/2.png,two\n")
        assert open_source(Data(spec=f"csv:{tmp_path}/pairs.csv")).read(0).image == b"png"
        for name in ("train/a_cat/1.png", "test/a_cat/2.png"):
            put(f"{base}/folder/{name}", name.encode())
        (record,) = map(open_source(Data(spec=f"folder:{base}/folder")).read, range(1))
        assert (record.image, record.captions, record.key) == (b"train/a_cat/1.png", ("a cat",), "a_cat/1")


KINDS = ["tsv", "csv", "parquet", "folder", "wds", "karpathy"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_examples(kinds, kind):
    source = open_source(kinds[kind])
    assert len(source) == N
    for example in shown(source, range(N)):
        record = example.record
        assert record.captions == tuple(captions(example.number))
        assert record.label == example.number % 3
        assert Path(record.key.partition(".png")[0]).name == f"{example.number:02}" or kind == "parquet"
        assert (np.asarray(example.image)[..., 0] == 4 * example.number).all()
    assert [record.captions for record in source.texts()] == [tuple(captions(i)) for i in range(N)]
    chunks = source.chunks()
    assert chunks.sum() == N
    in_chunks = [source.record_in(source.fetch(chunk), chunk, j) for chunk, size in enumerate(chunks) for j in range(size)]
    assert in_chunks == [source.read(i) for i in range(N)]


def test_batches_are_the_same_from_every_kind(kinds, tokenizer):
    def batches(kind):
        data = dataclasses.replace(kinds[kind], workers=2)
        with train_batches(open_source(data), tokenizer, data, image_size=8, batch_size=8, seed=3) as stream:
            return [next(stream) for _ in range(6)]

    first = batches("tsv")
    for kind in KINDS[1:]:
        for batch, other in zip(first, batches(kind), strict=True):
            assert batch.keys() == other.keys()
            for name in batch:
                np.testing.assert_array_equal(batch[name], other[name], err_msg=f"{kind} {name}")


def test_processes_read_every_kind(kinds, tokenizer):
    """What a source holds open or has read, it does not take along to another process."""
    parts = tuple(config.Part(spec=kinds[kind].spec, split="train", index=kinds[kind].index) for kind in KINDS)
    data = Data(sources=parts, workers=2)
    source = open_source(data)
    assert [len(list(part.texts())) for part in source.sources] == [N] * len(KINDS)
    assert all(source.read(i).image for i in range(len(source)))
    seen = {}
    for kind in ("threads", "processes"):
        of_kind = dataclasses.replace(data, worker_kind=kind)
        with train_batches(source, tokenizer, of_kind, image_size=16, batch_size=50, seed=0) as stream:
            seen[kind] = list(itertools.islice(stream, 3))
    assert not any(batch["replaced"].any() for batch in seen["processes"])
    for threads, processes in zip(seen["threads"], seen["processes"], strict=True):
        for name in threads:
            np.testing.assert_array_equal(threads[name], processes[name], err_msg=name)
