"""The order by windows on tars of a web server that fails now and then: the batches are those from the disk."""

import itertools

import numpy as np

from clipjax.config import Data
from clipjax.data.pipeline import train_batches
from clipjax.data.sources import open_source
from tests.data.http_server import serving
from tests.data.shards import img2dataset

FIELDS = dict(order="windows", lanes=4, window=20, workers=3)


def batches(data, source, tokenizer, steps):
    with train_batches(source, tokenizer, data, image_size=8, batch_size=16, seed=1) as stream:
        return list(itertools.islice(stream, steps))


def test_batches_from_a_failing_web_server_are_those_from_the_disk(tmp_path, tokenizer):
    folder = img2dataset(tmp_path / "web", shards=3, samples=40)
    here = Data(spec=f"wds:{folder}", index=str(tmp_path / "here"), **FIELDS)
    expected = batches(here, open_source(here), tokenizer, 9)
    with serving(folder, latency=0.005) as server:
        there = Data(spec=f"wds:{server.address}/{{00000..00002}}.tar", index=str(tmp_path / "there"), **FIELDS)
        source = open_source(there)
        server.asked.clear()
        server.faults += ["500", "cut", "short"]
        found = batches(there, source, tokenizer, 9)
        assert not server.faults
    for a, b in zip(found, expected, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    replaced = sum(int(batch["replaced"].sum()) for batch in expected)  # those without a caption
    assert replaced > 16
