import csv
import json

import numpy as np
import pytest

from clipjax.config import ConfigError
from clipjax.evals import results
from clipjax.evals.evaluation import Examples
from clipjax.evals.results import Row

HITS = np.array([1.0, 0.0, 1.0, np.nan, 0.5])
IMAGES = Examples(["a", "b", "c", "d", "é"], {"acc1": HITS}, facts={"class": ["cat"] * 5})
CAPTIONS = Examples(["a/0", "a/1", "b/0"], {"r": np.array([1.0, 1.0, 0.0])}, ["a", "a", "b"])
ROWS = [
    Row(
        name="cats", dataset="tsv:cats.tsv", model="run", pretrained="step 3", task="zeroshot_classification", main_metric="acc1",
        metrics={"acc1": 0.625, "acc5": None}, main=0.625, main_of=("acc1",), ci95=(0.5, 0.75), n=4, unreadable=1, protocol="own",
    ),
    Row(name="dogs", dataset="wds:dogs", model="run", pretrained="step 3", task="zeroshot_retrieval", main_metric="R@1",
        metrics={}, absent="no such folder"),
    Row(name="all", dataset="all", model="run", pretrained="step 3", task="mean", main_metric="main",
        metrics={"x": float("nan")}),
]  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    results.write(tmp_path, ROWS)
    read = results.read(tmp_path)
    assert read[:2] == ROWS[:2]
    assert read[2].metrics == {"x": None}  # JSON has no NaN
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert list(line)[:6] == ["dataset", "model", "pretrained", "task", "metrics", "language"]  # as CLIP_benchmark's
    table = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["name"], row["main"], row["low"], row["acc1"], row["absent"]) for row in table] == [
        ("cats", "0.625", "0.5", "0.625", ""), ("dogs", "", "", "", "no such folder"), ("all", "", "", "", ""),
    ]  # fmt: skip


def test_a_run_stands_for_the_folders_of_its_suites(tmp_path):
    folder = tmp_path / "suites" / "quick"
    results.write(folder, ROWS)
    assert results.folders(tmp_path) == results.folders(folder) == results.folders(folder / "results.jsonl") == [folder]
    with pytest.raises(ConfigError, match=r"holds no results.jsonl: run `clipjax eval suite` first"):
        results.folders(folder / "examples")
    (folder / "results.jsonl").write_text('{"dataset": "x"}\n')
    with pytest.raises(ConfigError, match="line 1 is none that"):
        results.read(folder)


def test_examples_come_back(tmp_path):
    results.write_examples(tmp_path, "cats", [IMAGES, CAPTIONS])
    first, second = results.read_examples(tmp_path, "cats")
    assert (first.keys, first.groups, second.keys, second.groups) == (IMAGES.keys, None, CAPTIONS.keys, CAPTIONS.groups)
    assert (first.facts, second.facts) == (IMAGES.facts, {})
    np.testing.assert_array_equal(first.values["acc1"], HITS)
    np.testing.assert_array_equal(second.values["r"], CAPTIONS.values["r"])
    assert results.read_examples(tmp_path, "dogs") == []
    results.write_examples(tmp_path, "cats", ())  # as where the set is absent now
    assert results.read_examples(tmp_path, "cats") == []
    results.write_examples(tmp_path, "dogs", ())
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["cats.npz"]


def test_the_draws_of_a_figure_are_those_of_its_queries():
    drawn = results.draws_of([IMAGES, CAPTIONS], ["acc1"], "cats")
    counted = HITS[~np.isnan(HITS)]
    assert np.nanmean(drawn) == pytest.approx(counted.mean(), abs=0.01)  # a draw of d alone has none
    assert results.draws_of([IMAGES], ["f1"], "cats") is None
    assert results.draws_of([Examples(["a"], {"r": np.array([np.nan])})], ["r"], "cats") is None


def test_both_directions_of_an_image_are_drawn_together():
    hits, keys = np.random.default_rng(0).integers(0, 2, 50).astype(float), [str(i) for i in range(50)]
    images, captions = Examples(keys, {"a": hits}), Examples([f"{k}#0" for k in keys], {"b": 1 - hits}, keys)
    np.testing.assert_allclose(results.draws_of([images, captions], ["a", "b"], "x"), 0.5, atol=1e-12)
