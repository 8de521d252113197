"""`clipjax bench step` and `clipjax bench input`: they time the run's own step and its own batches."""

import dataclasses
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from clipjax import aot, cli, config, plan, sharding
from clipjax.bench import input as reading
from clipjax.bench import parts, step
from clipjax.data.tokenizer import Tokenizer
from clipjax.metrics.flops import model_flops
from clipjax.models.text import lengths
from clipjax.plan.program import compile_lowered
from clipjax.train.workdir import Workdir
from tests.train import tiny, tiny_emoji

CONFIG = str(Path(tiny_emoji.__file__))


def command(*args):
    """Exit status of `clipjax bench`, however it comes."""
    try:
        return cli.main(["bench", *map(str, args)])
    except SystemExit as e:
        return e.code or 0


def test_a_step_is_the_one_that_trains(tmp_path, capsys, monkeypatch):
    compiled = []

    def spied(lowered, mesh):
        compiled.append(compile_lowered(lowered, mesh))
        return compiled[0]

    monkeypatch.setattr(step, "compile_lowered", spied)
    monkeypatch.setattr(step, "TURN", 0.01)
    out = tmp_path / "step.json"
    assert command("step", CONFIG, "--turns", 3, "--json", out, "--mesh.data", 2, "--mesh.fsdp", 4) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    run = tiny_emoji.config()
    assert found["peak_bytes"] == compiled[0].peak_bytes
    assert found["flops_per_step"] == 16 * model_flops(run.model)
    assert found["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1}
    assert (found["devices"], found["batch_size"], found["micro_batches"], found["remat"]) == (8, 16, 1, "none")
    assert len(found["seconds"]) == 3
    assert found["step_seconds"] == statistics.median(found["seconds"]) > 0
    assert found["images_per_second"] == pytest.approx(16 / found["step_seconds"])
    assert found["mfu"] is None
    assert "mesh: data 2, fsdp 4" in said
    assert "batch: 16 pairs; model.remat: none" in said
    assert "the chips' peak is not known" in said


@pytest.fixture(scope="module")
def everything():
    """A run whose batch has all that a batch may have."""
    data = config.Data(spec="emoji", captions_per_image=3, ids="caption", teacher="elsewhere.npz")
    return tiny.run(objective=(config.MultiPositive(), config.Distillation()), data=data)


def test_noise_has_what_a_batch_has(everything):
    mesh = sharding.make_mesh(everything.mesh)
    wanted, batch = plan.abstract_batch(everything, mesh), step.noise(everything, mesh)
    assert set(batch) == {"image", "text", "index", "id", "teacher_image", "teacher_text"}
    for name, x in wanted.items():
        assert (batch[name].shape, batch[name].dtype, batch[name].sharding) == (x.shape, x.dtype, x.sharding), name
    assert len(np.unique(batch["image"])) > 200
    np.testing.assert_array_equal(batch["index"], np.arange(16))
    text = everything.model.text
    assert (np.asarray(lengths(batch["text"])) == text.length).all()  # captions of full length: the most work there is
    assert 0 < np.min(batch["text"]) < np.max(batch["text"]) == text.vocab_size - 1


def test_a_known_chip_has_a_share(capsys):
    times = step.StepTimes(
        **dict(device_kind="TPU v5 lite", devices=8, mesh={"data": 8}, batch_size=1024, micro_batches=1, remat="full", part=4096),
        **dict(compile_seconds=60.0, peak_bytes=3 * 2**30, flops_per_step=2e14, step_seconds=0.5, images_per_second=2048.0),
        **dict(mfu=0.25, seconds=(0.4, 0.5, 0.7)),
    )
    said = "\n".join(step.lines(times))
    assert "0.5 s, median of 3 turns (0.4 to 0.7)" in said
    assert "2,048 (256 a device)" in said
    assert "4e+14; MFU 25.0% of the bfloat16 peak" in said
    assert "3.00 GiB" in said
    assert "model.remat: full in parts of 4,096 tokens" in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (aot.DoesNotFit(20 * 2**30, 16 * 2**30), "needs 20.00 GiB of 16.00 GiB a device: lower train.batch_size"),
        (aot.DoesNotFit(None, None), "needs an unknown size of an unknown size a device"),
        (aot.CompilerError("it broke"), "the compiler failed: it broke"),
    ],
)
def test_what_can_t_run_is_reported(error, message, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(step, "compile_lowered", fails)
    assert command("step", CONFIG) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_running_out_of_memory_in_a_step_is_reported(monkeypatch, capsys):
    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr(step, "compile_lowered", lambda *_: SimpleNamespace(program=None, peak_bytes=3 * 2**30))
    monkeypatch.setattr(step, "_timed", fails)
    assert command("step", CONFIG) == 1
    assert "out of memory: needs 3.00 GiB of " in capsys.readouterr().err


def test_batches_are_read_for_as_long_as_asked(tmp_path, capsys):
    """By threads and by processes."""
    out = tmp_path / "input.json"
    assert command("input", CONFIG, "--seconds", 1, "--json", out, "--train.batch_size", 64) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert (found["dataset"], found["examples"]) == ("emoji/train", 3426)
    assert (found["workers"], found["worker_kind"], found["batch_size"]) == (2, "threads", 64)
    assert "emoji/train: 3,426 examples, in batches of 64" in said
    assert list(found["streams"]) == ["threads", "processes"]
    for kind, stream in found["streams"].items():
        seconds = stream["batch_seconds"]
        assert sum(seconds) >= 1 > sum(seconds[:-1]) or len(seconds) == 2
        assert 64 / max(seconds) <= stream["examples_per_second"] <= 64 / min(seconds)
        assert stream["share"] == pytest.approx(stream["examples_per_second"] * found["sum"] / found["cores"] / 1e6)
        assert f"2 {kind}" in said
        assert f"median of {len(seconds):,} (" in said
    assert "2 threads (as configured)" in said
    assert found["streams"]["threads"]["cpu_microseconds"] > 0


def test_parts_of_an_example(tmp_path, capsys):
    """They add up to what the sum says, and the order and the draws are a small part."""
    source = reading.open_source(tiny_emoji.config().data)
    run = tiny_emoji.config()
    tokenizer = reading.build.tokenizer(run, Workdir(tmp_path), source)
    found = parts.measure(run, source, tokenizer)
    assert list(found)[:-1] == ["read", "wait", "decode", "resize", "tokenise", "rest", "stack"]
    assert min(found[part] for part in ("read", "decode", "resize", "tokenise", "stack", "transfer")) > 0
    said = list(parts.lines(found))
    assert [line.split()[0] for line in said[1:8]] == [*parts.PARTS, "sum"]
    assert float(said[7].split()[1].replace(",", "")) == pytest.approx(sum(found[part] for part in parts.PARTS), abs=0.06)


def test_parts_of_data_that_can_hardly_be_used(tmp_path, monkeypatch):
    """Bad and filtered examples are passed over; where nothing else is left, the data are named."""
    (tmp_path / "a.png").write_bytes(b"torn")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b.png")
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.png\tone\nb.png\ttwo\n")
    run, data = tiny_emoji.config(), config.Data(spec=f"tsv:{tmp_path / 'pairs.tsv'}")
    run = dataclasses.replace(run, data=data, train=dataclasses.replace(run.train, batch_size=2), evals=())
    source = reading.open_source(run.data)
    tokenizer = Tokenizer.train(["one", "two"], 300, lowercase=True, length=run.model.text.length)
    monkeypatch.setattr(parts, "TRIED", 40)
    assert parts.measure(run, source, tokenizer)["decode"] > 0
    (tmp_path / "b.png").write_bytes(b"torn")
    with pytest.raises(config.ConfigError, match=r"hardly any of 40 examples of tsv:.* can be used"):
        parts.measure(run, source, tokenizer)


def test_what_is_read_is_what_trains(monkeypatch):
    seen, real = [], reading.build.batches

    def spied(*args, **keyed):
        seen.append(args[0])
        return real(*args, **keyed)

    monkeypatch.setattr(reading.build, "batches", spied)
    run = tiny_emoji.config()
    found = reading.measure(run, 0.0)
    assert seen == [run, dataclasses.replace(run, data=dataclasses.replace(run.data, worker_kind="processes"))]
    assert [len(stream.batch_seconds) for stream in found.streams.values()] == [2, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["step"], "CONFIG.py is needed"),
        (["step", "nowhere.py"], "CONFIG.py = 'nowhere.py': is not a file"),
        (["step", CONFIG, "--turns", 0], "0 must be positive"),
        (["step", CONFIG, "--mesh.data", 3], "mesh.data = 3"),
        (["step", CONFIG, "--train.batchsize", 8], "batchsize"),
        (["input", CONFIG, "--data.spec", "tsv:none.tsv", "--evals", "none"], "none.tsv does not exist"),
        (["input", CONFIG, "--train.batch_size", 4000], "is more than the 3426 examples"),
        (["loss", "--train.steps", 3], "unrecognized arguments: --train.steps 3"),
    ],
)
def test_wrong_use(args, message, capsys):
    assert command(*args) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize("what", ["step", "input"])
def test_help_lists_the_run_s_fields(what, capsys):
    assert command(what, "--help") == 0
    assert "CONFIG.py" in capsys.readouterr().out
    assert command(what, CONFIG, "--help") == 0
    assert "--train.batch-size" in capsys.readouterr().out
