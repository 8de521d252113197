"""A set in img2dataset's layout, made with webdataset's writer: counted, trained on, evaluated and embedded."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from clipjax import cli
from tests.data import shards
from tests.train import tiny_emoji

KEYS = [f"{i // 30:05}{i:04}" for i in range(90)]
WHOLE = [key for i, key in enumerate(KEYS) if i % 7 != 6]  # the others have no caption
OPTIONS = "--train.steps 6 --train.checkpoint_every 3 --optim.schedule.warmup 2 --evals.0.every 3 --data.split train#0-60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of 30 samples as img2dataset leaves them; and a fourth of which two of three downloads failed."""
    folder = shards.img2dataset(tmp_path_factory.mktemp("laion") / "set", shards=3, samples=30)
    with webdataset.TarWriter(str(folder / "00003.tar")) as writer:
        writer.write({"__key__": "000030090", "json": json.dumps({"status": "failed_to_download"}), "txt": "number 90"})
        writer.write({"__key__": "000030091", "jpg": shards.jpeg(91)[:300], "txt": "number 91", "json": "{}"})
        writer.write({"__key__": "000030092", "json": json.dumps({"status": "failed_to_resize"})})
    return folder


@pytest.fixture(scope="module")
def spec(folder):
    return f"wds:{folder}"


@pytest.fixture(scope="module")
def workdir(spec, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    evaluation = ["--evals.0.split", "train#60-100"]
    command = ["train", str(Path(tiny_emoji.__file__)), "--workdir", str(path), "--data.spec", spec]
    assert cli.main([*command, *OPTIONS.split(), *evaluation]) == 0
    return path


def in_share(keys, first, end):
    return [key for key in keys if first <= zlib.crc32(key.encode()) % 100 < end]


def test_samples_are_counted(spec, tmp_path, capsys):
    assert cli.main(["data", "index", spec, "--out", str(tmp_path / "index")]) == 0
    said = capsys.readouterr().out
    assert "91 samples in 4 shards; suffixes: jpg 91, json 91, txt 79" in said
    assert "left out: 2 no image" in said
    assert cli.main(["data", "inspect", spec, "--png", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["examples"] == 91
    assert list(report["unreadable"]) == ["000030091"]


def test_it_is_trained_on(workdir, spec):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    share = in_share([*KEYS, "000030091"], 0, 60)
    bad = len(set(share) - set(WHOLE))
    assert 0 < sum(line["replaced"] for line in lines if "loss" in line) <= 6 * bad
    assert {line["dataset"] for line in lines if "task" in line} == {f"{spec}/train#60-100"}


def test_the_rest_is_evaluated_and_embedded(workdir, spec, tmp_path, capsys):
    share = ["--data", spec, "--split", "train#60-100"]
    assert cli.main(["eval", "retrieval", str(workdir), *share, "--json", str(tmp_path / "r.json")]) == 0
    by_text = json.loads((tmp_path / "r.json").read_text())
    assert by_text["dataset"] == f"{spec}/train#60-100"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line["metrics"] for line in lines if "task" in line][-1]
    assert by_text["metrics"] == pytest.approx(last, abs=1e-6)
    assert cli.main(["embed", str(workdir), *share, "--text-field", "json.alt", "--out", str(tmp_path / "z.npz")]) == 0
    with np.load(tmp_path / "z.npz") as arrays:
        assert arrays["key"].tolist() == in_share(KEYS, 60, 100)  # every json has an `alt`
        assert arrays["image"].shape == arrays["text"].shape == (len(arrays["key"]), 32)
    capsys.readouterr()
    assert cli.main(["embed", str(workdir), *share, "--text-field", "json.title", "--out", str(tmp_path / "z.npz")]) == 2
    assert "none of its 42 examples has a caption" in capsys.readouterr().err
