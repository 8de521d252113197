"""`clipjax eval compare`: pairing by keys, means over sets, what is absent, and the exit status."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clipjax import cli
from clipjax.config import ConfigError
from clipjax.evals import results
from clipjax.evals.comparison import compare
from clipjax.evals.evaluation import Examples
from clipjax.evals.results import Row

N = 200
KEYS = [f"{i:03}" for i in range(N)]
RNG = np.random.default_rng(0)
HITS = RNG.integers(0, 2, (2, N)).astype(float)  # of the sets cats and dogs
SUITES = ("suites", "quick")


def row(name, task="zeroshot_classification", **fields):
    known = dict(dataset=name, model="run", pretrained="step 1", metrics={"acc1": 0.5}, main_metric="acc1", main_of=("acc1",))
    return Row(**known | dict(name=name, task=task, main=0.5) | fields)


def write(run, cats, dogs=HITS[1], keys=KEYS, changed=None):
    """A workdir with the results of a suite of two sets and their mean."""
    folder = run.joinpath(*SUITES)
    rows = [row("cats"), row("dogs"), row("both", results.MEAN, main_of=("cats", "dogs"), metrics={})]
    results.write(folder, [replace(one, **(changed or {}).get(one.name, {})) for one in rows])
    results.write_examples(folder, "cats", [Examples(keys, {"acc1": cats})])
    results.write_examples(folder, "dogs", [Examples(KEYS, {"acc1": dogs})])
    return run


def better(hits, share, seed=1):
    return np.where(np.random.default_rng(seed).random(N) < share, 1.0, hits)


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "a", HITS[0])


def test_a_run_against_itself(run):
    found = compare(run, run)
    assert [(d.name, d.b - d.a, d.interval, d.n) for d in found] == [
        ("cats", 0, (0, 0), N), ("dogs", 0, (0, 0), N), ("both", 0, (0, 0), 2),
    ]  # fmt: skip


def test_intervals_of_sets_and_of_their_mean(run, tmp_path):
    other = write(tmp_path / "b", better(HITS[0], 0.2), better(HITS[1], 0.2, 2))
    cats, dogs, both = compare(run, other)
    delta = [np.subtract(better(HITS[0], 0.2), HITS[0]), np.subtract(better(HITS[1], 0.2, 2), HITS[1])]
    assert cats.b - cats.a == pytest.approx(delta[0].mean())
    assert both.b - both.a == pytest.approx(np.mean(delta))
    for found, error in (
        (cats, delta[0].std() / N**0.5),
        (dogs, delta[1].std() / N**0.5),
        (both, np.hypot(delta[0].std(), delta[1].std()) / 2 / N**0.5),
    ):
        assert np.ptp(found.interval) == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert not any(d.worse(0) for d in (cats, dogs, both))
    back = compare(other, run)
    assert all(d.worse(0) for d in back)
    assert not any(d.worse(0.1) for d in back)  # the difference is about 0.1


def test_queries_are_matched_by_their_keys(run, tmp_path):
    """Another order, and queries that only one of the runs could read."""
    order = np.random.default_rng(3).permutation(N)[:150]
    other = write(tmp_path / "b", HITS[0][order], keys=[KEYS[i] for i in order])
    cats = compare(run, other)[0]
    assert (cats.n, cats.interval, cats.note) == (150, (0, 0), "50 queries are not in both")
    uncounted = HITS[0].copy()
    uncounted[:20] = np.nan
    found = compare(run, write(tmp_path / "c", uncounted))[0]
    assert (found.n, found.note) == (180, "20 queries are not in both")
    both = compare(tmp_path / "c", tmp_path / "c")[0]
    assert (both.n, both.note) == (180, "")  # what counts in neither is in neither


def test_both_directions_of_retrieval_are_one_figure(tmp_path):
    """`main_of` names two metrics of two kinds of queries; the captions of an image are drawn with it."""
    runs = []
    for name in "ab":
        run = tmp_path / name
        folder = run.joinpath(*SUITES)
        results.write(folder, [row("coco", "zeroshot_retrieval", main_metric="mean", main_of=("i", "t"))])
        t = better(HITS[0], 0.3 * (name == "b"))
        i = np.repeat(t, 2)
        examples = [Examples([f"{k}/{j}" for k in KEYS for j in "12"], {"i": i}, np.repeat(KEYS, 2).tolist())]
        results.write_examples(folder, "coco", [*examples, Examples(KEYS, {"t": t})])
        runs.append(run)
    (found,) = compare(*runs)
    delta = better(HITS[0], 0.3) - HITS[0]
    assert found.b - found.a == pytest.approx(delta.mean())
    assert np.ptp(found.interval) == pytest.approx(2 * 1.96 * delta.std() / N**0.5, rel=0.05)  # not shorter by the root of three


def test_what_is_absent_is_named(run, tmp_path):
    other = write(tmp_path / "b", HITS[0], changed={"dogs": {"absent": "no such folder", "main": None}})
    _, dogs, both = compare(run, other)
    assert (dogs.interval, dogs.note) == (None, "absent in B: no such folder")
    assert (both.n, both.note) == (1, "without 1 of its 2 sets")
    with pytest.raises(ConfigError, match=r"no set with acc9 of each query in both.*dogs: absent in B"):
        compare(run, other, "acc9")
    with pytest.raises(ConfigError, match="run `clipjax eval suite` first"):
        compare(run, tmp_path)


def test_the_command(run, tmp_path, capsys):
    other = write(tmp_path / "b", better(HITS[0], 0.2))
    assert cli.main(["eval", "compare", str(run), str(other), "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == [
        *("quick", "dogs", "acc1", f"{HITS[1].mean():.4f}", f"{HITS[1].mean():.4f}", "+0.0000", "[+0.0000,", "+0.0000]", "200"),
    ]  # fmt: skip
    written = json.loads((tmp_path / "out.json").read_text())["differences"]
    assert [(d["name"], d["worse"]) for d in written] == [("cats", False), ("dogs", False), ("both", False)]
    assert cli.main(["eval", "compare", str(other), str(run), "--metric", "acc1"]) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("WORSE")
    assert cli.main(["eval", "compare", str(other), str(run), "--margin", "0.2"]) == 0
