"""Weights & Biases, offline: its own files are read. Each line once, also over a resume; its errors never end a training."""

import dataclasses
import importlib.util
import json
import logging
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from clipjax import cli, config
from clipjax.metrics.wandb_board import require_package
from clipjax.metrics.writer import MetricsWriter
from tests.train import tiny, tiny_emoji

Record = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]
RUN = tiny.run(train=dataclasses.replace(tiny.TRAIN, wandb="team/emoji"))
RECALL = "zeroshot_retrieval/emoji/test/recall"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def scan(file):
    """The records of a .wandb file, in LevelDB's log format: blocks of 32 KiB, in them parts of records."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: padding
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def sent(workdir):
    """For each start of the run: id, configuration, exit code, and the rows, as W&B's server would get them."""
    for folder in sorted((workdir / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_ctime_ns):
        (file,) = folder.glob("*.wandb")
        records = list(scan(file))
        (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
        exits = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
        rows = []
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append({name: value for name, value in items.items() if name not in ("_timestamp", "_runtime")})
        yield (
            f"{run.entity}/{run.project}/{run.run_id}",
            {c.key: json.loads(c.value_json) for c in run.config.update},
            exits,
            rows,
        )


def push(writer, steps):
    """A training line a step; an evaluation with an image after step 2 and its multiples."""
    for step in steps:
        writer.push(step, {"loss": jnp.float32(1 / step)}, {"mfu": None})
        if step % 2 == 0:
            writer.flush()
            image = np.full((2, 3, 3), step, np.uint8)
            writer.evaluation(step, "zeroshot_retrieval", {"recall": step / 8, "plot": image}, dataset="emoji/test")
    writer.flush()


def test_a_resume_goes_on_in_the_same_run_and_sends_no_line_twice(tmp_path, capsys):
    for start, stop in ((0, 5), (2, 7)):  # the second start sends 3 to 5 again, if nobody holds it back
        writer = MetricsWriter(tmp_path, start, run=RUN)
        push(writer, range(start + 1, stop + 1))
        writer.close()
    said = capsys.readouterr().err
    (first, cfg, exits, rows), (again, _, _, more) = sent(tmp_path)
    record = json.loads((tmp_path / "wandb.json").read_text())
    assert first == again == f"team/emoji/{record['id']}"
    assert said.count(f"Weights & Biases, run {record['id']}: `wandb sync --append {tmp_path}/wandb/offline-run-") == 2
    assert exits == [0]
    assert cfg["train"]["batch_size"] == RUN.train.batch_size
    assert cfg["objective"] == [json.loads(config.to_json(RUN))["objective"][0]]
    for group, steps in (("loss", [[1, 2, 3, 4, 5], [6, 7]]), (RECALL, [[2, 4], [6]])):
        assert [[r["step"] for r in part if group in r] for part in (rows, more)] == steps
    images = [r["step"] for r in rows + more if f"{RECALL[:-6]}plot.path" in r]
    assert images == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows + more if "loss" in r] == [r["loss"] for r in lines if "loss" in r]
    numbers = [r["_step"] for r in rows + more]
    assert numbers == sorted(set(numbers))  # W&B would ignore a row with a smaller number
    assert (rows[0]["_step"], more[-1]["step"]) == (1, 7)


def test_a_run_from_the_start_and_another_project_are_new_runs(tmp_path):
    other = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, wandb="else"))
    ids = []
    for run, step in ((RUN, 0), (RUN, 0), (RUN, 1), (other, 1)):
        MetricsWriter(tmp_path, step, run=run).close()
        ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert [name for name, *_ in sent(tmp_path)] == [*(f"team/emoji/{i}" for i in ids[:3]), f"/else/{ids[3]}"]
    assert (len(set(ids)), ids[1]) == (3, ids[2])


@pytest.mark.parametrize("fails", ["init", "log"])
def test_an_error_costs_one_warning(fails, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(*{"init": (wandb, "init", fail), "log": (wandb.Run, "log", fail)}[fails])
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, run=RUN)
        push(writer, range(1, 4))
        writer.close()
    assert [r.getMessage() for r in caplog.records] == ["train.wandb: ConnectionError: no network; the training goes on"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_without_the_server_it_is_written_here(tmp_path, monkeypatch, caplog):
    init = wandb.init

    def refuse(**more):
        if more.get("mode") != "offline":
            raise wandb.errors.CommError("no network")
        return init(**more)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, run=RUN)
        push(writer, range(1, 2))
        writer.close()
    ((_, _, _, rows),) = sent(tmp_path)
    assert [r["step"] for r in rows] == [1]
    (record,) = caplog.records
    assert "no network; it is written to this machine only" in record.getMessage()


def test_other_processes_send_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    MetricsWriter(tmp_path, run=RUN).close()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["train", tiny_emoji.__file__, "--workdir", str(tmp_path / "run"), "--train.wandb", "emoji"]
    assert cli.main(command) == 2
    assert (
        "train.wandb = 'emoji': needs the package wandb, which is not installed: pip install 'clipjax[wandb]'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    found = importlib.util.spec_from_loader("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(config.ConfigError, match="not installed"):
        require_package("emoji")


@pytest.mark.parametrize("name", ["", "a/b/c", "a/", "/a", "a#b", "a?", "a b/c"])
def test_a_wrong_project_is_refused(name):
    with pytest.raises(config.ConfigError, match=r"^train\.wandb = '.*': must be PROJECT or ENTITY/PROJECT"):
        config.Train(wandb=name)


def test_a_right_project_is_not():
    for name in ("emoji", "my-team.1/an_emoji project"):
        assert config.Train(wandb=name).wandb == name
