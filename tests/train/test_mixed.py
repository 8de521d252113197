"""Training on a mixture: what is said of its parts, at the start and in the lines."""

import dataclasses
import json

from PIL import Image

from clipjax import build, config
from clipjax.data.sources import open_source
from clipjax.train.loop import train
from clipjax.train.origin import changes_order
from clipjax.train.workdir import open_workdir
from tests.data.conftest import write_tsv
from tests.train import tiny


def pairs(folder, name, count):
    """A tsv of so many small images."""
    for i in range(count):
        Image.new("RGB", (9, 9), (4 * i, 0, 0)).save(folder / f"{i}.png")
    return write_tsv(folder, [(f"{i}.png", f"number {i}") for i in range(count)]).rename(folder / f"{name}.tsv")


def test_a_run_says_share_and_epochs_of_each_part(tmp_path, capsys):
    many, few = pairs(tmp_path, "many", 41), pairs(tmp_path, "few", 10)
    parts = (config.Part(spec=f"tsv:{many}", weight=3.0), config.Part(spec=f"tsv:{few}", weight=1.0))
    data = config.Data(sources=parts, workers=2, order="windows", lanes=4, window=8)
    made = dataclasses.replace(tiny.TRAIN, steps=5, log_every=5, checkpoint_every=5)
    run = tiny.run(data=data, train=made)
    source, mesh = open_source(data), tiny.mesh_of(2)
    with open_workdir(run, tmp_path / "run", mesh) as workdir:
        tokens = build.tokenizer(run, workdir, source)
        train(run, workdir, build.batches(run, source, tokens), [], mesh, source)
    said = capsys.readouterr().err
    assert f"5 steps of 16 = 80 examples, 1.6 epochs of tsv:{many} + tsv:{few} (51)\n" in said
    assert f"  many: 12 of each batch (75.00%), 1.5 epochs of tsv:{many} (41)\n" in said
    assert f"  few: 4 of each batch (25.00%), 2.0 epochs of tsv:{few} (10)\n" in said
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["epoch"] == 80 / 51
    assert line["epoch/many"] == 60 / 41
    assert line["epoch/few"] == 2
    assert line["replaced"] == 0


def test_another_share_or_part_is_another_order():
    def run(*parts, **fields):
        return tiny.run(data=config.Data(sources=parts, **fields))

    first, second = config.Part(spec="tsv:a.tsv", weight=1.0), config.Part(spec="tsv:b.tsv", weight=2.0)
    before = run(first, second)
    heavier, cleaner = (dataclasses.replace(second, **change) for change in ({"weight": 3.0}, {"text_field": "clean"}))
    for order in (run(first, heavier), run(first, second, second), run(second, first), run(first, second, order="windows")):
        assert changes_order(before, order)
    assert not changes_order(before, run(first, cleaner))
