"""Which data a checkpoint was trained on, and what happens to a run that resumes with others."""

import shutil

import numpy as np
import pytest
from PIL import Image

from clipjax.data import fingerprint
from clipjax.data.source import Record, Source
from tests.test_cli import run

CONFIG = "tests/train/tiny_hosts.py"


class Rows(Source):
    """Examples from rows of a key and captions; None is one that can't be read."""

    def __init__(self, rows, name="rows", version="", sources=()):
        super().__init__()
        self.rows, self.name, self.version, self.sources = rows, name, version, sources

    def __len__(self):
        return len(self.rows)

    def _record(self, i):
        if self.rows[i] is None:
            raise OSError("a cut connection")
        key, *captions = self.rows[i]
        return Record(b"never decoded", tuple(captions), key)


def rows(n, **changes):
    made = [(f"{i}.png", f"number {i}") for i in range(n)]
    for i, row in changes.items():
        made[int(i[1:])] = row
    return made


def changed(before, after):
    return fingerprint.differences(fingerprint.of(before), fingerprint.of(after), after)


def test_the_same_data_have_the_same_fingerprint_wherever_they_lie():
    first, again = Rows(rows(5000)), Rows(rows(5000), name="elsewhere")
    assert changed(first, again) == []
    assert len(fingerprint.of(first)["keys"]) == 1000
    distant, other = (Rows(rows(5000, **change), name="wds:gs://bucket/a.tar") for change in ({}, {"_4999": ("b.png", "b")}))
    assert len(fingerprint.of(distant)["keys"]) == 100
    assert (changed(first, distant), changed(distant, first)) == ([], [])
    assert len(changed(first, other)) == len(changed(other, first)) == 2  # keys and captions
    assert fingerprint.of(Rows(rows(3)))["keys"] == [1538739476, 1725392036, 561454708]  # on every machine, in every release


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Rows(rows(39)), ["examples: 40 -> 39"]),
        (Rows(rows(40), version="2.0"), ["version: (none) -> 2.0"]),
        (
            Rows(rows(40, _7=("7.png", "seven"), _9=("9.png", "number 9", "nine"))),
            ["captions: 2 of 40 examples have other ones; the first is number 7, now '7.png'"],
        ),
        (
            Rows(rows(40, _39=("a" * 99, "number 39"))),
            [f"keys: 1 of 40 examples have other ones; the first is number 39, now '{'a' * 60}...'"],
        ),
        (Rows(rows(40, _3=None)), []),  # a read that failed now and then is no other example
    ],
)
def test_what_differs_is_named(after, said):
    assert changed(Rows(rows(40)), after) == said


def test_parts_of_a_mixture_are_told_apart():
    def mixture(*parts):
        return Rows([row for part in parts for row in part.rows], sources=parts)

    one, two = Rows(rows(30), "a.tsv"), Rows(rows(40), "b.tsv")
    assert changed(mixture(one, two), mixture(one, two)) == []
    assert changed(mixture(one, two), mixture(one, Rows(rows(41), "b.tsv"))) == ["b.tsv, examples: 40 -> 41"]
    assert changed(mixture(one, two), mixture(one)) == ["parts: 2 -> 1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    write(folder, rows(40))
    return folder


def write(folder, pairs):
    (folder / "pairs.tsv").write_text("".join("\t".join(row) + "\n" for row in [("filepath", "title"), *pairs]))


def train(data, workdir, steps, *options):
    given = ["--data.spec", f"tsv:{data}/pairs.tsv", "--train.steps", str(steps), "--optim.schedule.warmup", "0", *options]
    return run("train", CONFIG, "--workdir", workdir, *given)


def test_a_swapped_file_is_refused_unless_the_user_accepts_it(data, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(data, workdir, 1) == 0
    write(data, rows(40, _7=("7.png", "seven")))
    capsys.readouterr()
    assert train(data, workdir, 2) == 2
    refusal, difference, version = capsys.readouterr().err.splitlines()
    assert refusal.startswith(f"clipjax: data = tsv:{data}/pairs.tsv: is not what {workdir}@1 was trained on; bring that back, ")
    assert version.startswith("  version: ")  # of a tsv: a digest of all of it
    assert difference == "  captions: 1 of 40 examples have other ones; the first is number 7, now '7.png'"
    assert train(data, workdir, 2, "--accept-new-data") == 0
    assert "the data are others than before, as --accept-new-data allows: captions: 1 of 40" in capsys.readouterr().err
    assert train(data, workdir, 2) == 0  # now it knows them
    assert "finished" in capsys.readouterr().err

    write(data, rows(39))
    assert train(data, workdir, 2) == 2
    capsys.readouterr()
    (workdir / "checkpoints" / "2" / "data" / "metadata").write_text("{")
    assert train(data, workdir, 2) == 0
    assert f"which data it was trained on is not known: {workdir}@2 can't be read" in capsys.readouterr().err
    shutil.rmtree(workdir / "checkpoints" / "2" / "data")  # as an older release saved it
    assert train(data, workdir, 2) == 0
