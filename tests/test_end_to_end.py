"""All steps on real data: train, evaluate and export by the command line; then the same accuracy in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from clipjax import cli, config
from clipjax.data.faults import shown
from clipjax.data.sources import open_source
from clipjax.evals.ties import TIE
from clipjax.export.compare.reference import load
from tests import torch_reference
from tests.train import tiny_emoji

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

FORMATS = {"open_clip": "open_clip_model.safetensors", "transformers": "model.safetensors"}
OPTIONS = (
    "--model.image.image_size 32 --model.text.length 20 --train.steps 240 --train.batch_size 64 --optim.lr 4e-3 "
    "--train.log_every 40 --train.checkpoint_every 240 --evals.0.every 240 --train.eval_batch_size 128"
)


@pytest.fixture(scope="module", autouse=True)
def torch():
    torch_reference.load()
    import torch

    return torch


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", str(Path(tiny_emoji.__file__)), "--workdir", str(path), *OPTIONS.split()]) == 0
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3  # it learns
    return path


@pytest.fixture(scope="module")
def metrics(workdir):
    command = ["eval", "zeroshot", str(workdir), "--data", "emoji", "--split", "test", "--templates", "plain"]
    assert cli.main([*command, "--json", str(workdir.parent / "zeroshot.json")]) == 0
    return json.loads((workdir.parent / "zeroshot.json").read_text())["metrics"]


@pytest.mark.parametrize("to", FORMATS)
def test_the_export_is_as_accurate_in_torch(workdir, metrics, tmp_path, capsys, torch, to):
    out = tmp_path / "out"
    assert cli.main(["export", str(workdir), "--to", to, "--out", str(out), "--verify", "--examples", "48"]) == 0
    assert "verified in PyTorch on 48 examples" in capsys.readouterr().out
    source, theirs = open_source(config.Data(spec="emoji", split="test")), load(out, to)  # its own preprocessing and tokenizer
    names = source.classnames
    assert (len(source), len(names)) == (363, 3789)
    with torch.inference_mode():
        pixels, ids = theirs.pixels([x.image for x in shown(source, range(len(source)))]), theirs.ids(names)
        assert pixels.shape == (363, 3, 32, 32)
        assert ids.shape == (3789, 20)
        images = theirs.encode(pixels, ids[:1])[0].double().numpy()
        texts = np.concatenate([theirs.encode(pixels[:1], part)[1].double().numpy() for part in ids.split(512)])
    for embeddings in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    cosines = images @ texts.T
    labels = np.array([names.index(source.record(i).captions[0]) for i in range(len(source))])
    right = np.take_along_axis(cosines, labels[:, None], 1)
    rank = 1 + (cosines > right + TIE).sum(1) + ((np.abs(cosines - right) <= TIE).sum(1) - 1) / 2
    hits = {k: int((rank <= k).sum()) for k in (1, 5)}
    print(f"{to}: {hits} of {len(source)}, median rank {np.median(rank)}")
    assert hits[5] > 5 * 363 * 5 / 3789  # far above chance, so that an agreement says something
    assert metrics["acc1"] == pytest.approx(hits[1] / 363, abs=1e-9)
    assert metrics["acc5"] == pytest.approx(hits[5] / 363, abs=1e-9)
    assert metrics["mean_per_class_recall"] == pytest.approx(hits[1] / 363, abs=1e-9)


@pytest.mark.parametrize("to", FORMATS)
def test_a_wrong_tensor_fails_the_verification(workdir, tmp_path, capsys, monkeypatch, to):
    from clipjax.export import folder

    export = folder.export

    def export_and_corrupt(*args):
        export(*args)
        file = tmp_path / "out" / FORMATS[to]
        tensors = safetensors.numpy.load_file(file)
        name = next(n for n in tensors if n.endswith("mlp.fc1.weight" if to == "transformers" else "mlp.c_fc.weight"))
        tensors[name] = tensors[name][::-1].copy()
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(folder, "export", export_and_corrupt)
    assert cli.main(["export", str(workdir), "--to", to, "--out", str(tmp_path / "out"), "--verify"]) == 1
    errors = capsys.readouterr().err
    assert " differs by " in errors
    assert "more than 1e-04" in errors
    assert "Traceback" not in errors
