"""Training and evaluation on several real processes: the losses, examples, files and figures of one."""

import json
import signal

import numpy as np
import pytest
from PIL import Image

from clipjax.evals import results
from tests import hosts

IMAGES = 41
PROGRAM = ["tests/train/recorded.py"]  # the command line, with a record of each global batch's examples
CONFIG = "tests/train/tiny_hosts.py"
OVER_DATA = ("--mesh.shard_optimizer", "True")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # half the time goes into compiling
SUITE = "tests/train/tiny_suite.py"
EVALS = """
import json, sys
from clipjax import cli, distributed
for command in json.loads(sys.argv[1]):
    args = cli.make_parser().parse_args(command)
    args.run(args)
distributed.leave(0, None)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tsv of noise: image i is `number i`."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [f"{i}.png\tnumber {i}" for i in range(IMAGES)]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    (folder / "names.txt").write_text("\n".join(f"number {i}" for i in range(IMAGES)) + "\n")
    return folder


def command(data, workdir, *options):
    return [*PROGRAM, "train", CONFIG, "--workdir", str(workdir), "--data.spec", f"tsv:{data}/pairs.tsv", *options]


def train(n, devices, data, workdir, *options, **env):
    """A run on n processes to its end; the examples of each of its global batches are in records beside the workdir."""
    env |= QUICK | {"RECORD": str(workdir.with_suffix(".record"))}
    return hosts.run(n, command(data, workdir, *options), workdir.with_suffix(f".{n}"), devices, **env)


def examples(workdir, steps):
    """The set of examples of each step's global batch, over all processes that took a part in it."""
    batches = [set() for _ in range(steps)]
    for path in workdir.parent.glob(f"{workdir.name}.record.*"):
        for step, line in enumerate(path.read_text().splitlines()):
            batches[step] |= set(json.loads(line))
    return batches


def same(data, tmp_path, *options):
    one, two = tmp_path / "one", tmp_path / "two"
    train(1, 1, data, one, *options)
    both = train(2, 4, data, two, *options)
    want, got = hosts.losses(one), hosts.losses(two)
    assert list(want) == list(got) == list(range(1, 21))
    assert abs(want[20] - want[1]) > 1e-2  # it moves
    np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-5)
    assert [len(batch) for batch in examples(one, 20)] == [16] * 20
    assert examples(one, 20) == examples(two, 20)
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    counts = [[(line["replaced"], line["truncated"]) for line in hosts.metrics(path)] for path in (one, two)]
    assert counts[0] == counts[1]
    assert "step 20/20" in both[0].complained
    assert "step" not in both[1].complained.replace("steps", "")  # the first speaks for all
    return both


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_device(data, tmp_path):
    same(data, tmp_path)


@pytest.mark.slow
def test_so_they_do_with_siglip(data, tmp_path, monkeypatch):
    config = tmp_path / "siglip.py"
    config.write_text("from tests.train.tiny_hosts import siglip as config  # noqa: F401\n")
    monkeypatch.setattr("tests.train.test_hosts.CONFIG", str(config))
    same(data, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_as_if_nothing_had_happened(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(4, 1, data, whole, "--train.steps", "15")
    steps = 0
    for n, devices, until in ((4, 1, 5), (2, 2, 10), (1, 1, 15)):
        run = parts.with_name(f"parts-{until}")
        env = QUICK | {"RECORD": str(run.with_suffix(".record"))}
        made = hosts.run(n, command(data, parts, "--train.steps", str(until)), tmp_path / str(until), devices, **env)
        assert steps == 0 or f"resuming at step {steps}" in made[0].complained
        assert examples(run, until - steps) == examples(whole, 15)[steps:until]
        steps = until
    want, got = hosts.losses(whole), hosts.losses(parts)
    assert list(got) == list(range(1, 16))
    assert [got[step] for step in range(1, 6)] == [want[step] for step in range(1, 6)]  # the same layout
    np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-5)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The workdir of 12 steps by two processes, each of which has half of the optimizer's state."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(2, 1, data, workdir, "--train.steps", "12", *OVER_DATA)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(who, data, trained, tmp_path):
    broken = tmp_path / "broken"
    env = QUICK | {"RECORD": str(tmp_path / "record"), "CLIPJAX_HEARTBEAT_SECONDS": "5"}
    options = ("--train.steps", "12", "--train.checkpoint_every", "3", *OVER_DATA)
    workers = ("--data.worker_kind", "processes", "--data.workers", "1")
    with hosts.started(2, command(data, broken, *options, *workers), tmp_path / "first", **env) as both:
        hosts.until(both, both[0].err, "step 5/12")
        both[who].signal(signal.SIGKILL)
        assert hosts.ended([both[1 - who]]) == [75], hosts.report(both)
        assert f"clipjax: process {who} (" in both[1 - who].complained
    made = train(2, 1, data, broken, *options)
    assert "resuming at step" in made[0].complained
    assert hosts.losses(broken) == hosts.losses(trained)


@pytest.mark.slow
def test_evaluations_and_embeddings_of_two_processes_are_those_of_one(data, trained, tmp_path):
    run, spec, place = trained, f"tsv:{data}/pairs.tsv", ("--root", str(data))
    found = {}
    for n, devices in ((1, 1), (2, 2)):
        out = tmp_path / f"out{n}"
        out.mkdir()
        commands = [
            ["eval", "retrieval", str(run), "--data", spec, "--json", f"{out}/retrieval.json"],
            ["eval", "geometry", str(run), "--data", spec, "--json", f"{out}/geometry.json"],
            ["eval", "zeroshot", str(run), "--data", spec, "--classnames", f"{data}/names.txt", "--json", f"{out}/zeroshot.json"],
            ["embed", str(run), "--data", spec, "--out", f"{out}/rows.npz"],
            *(["eval", "suite", str(run), SUITE, *place, "--cache", f"{out}/kept", "--out", f"{out}/{i}"] for i in "ab"),
        ]
        made = hosts.run(n, ["-c", EVALS, json.dumps(commands)], out, devices, **QUICK)
        assert made[0].said.count('"task"') == 3
        assert all(not host.said for host in made[1:])
        found[n] = [json.loads((out / f"{name}.json").read_text())["metrics"] for name in ("retrieval", "geometry", "zeroshot")]
        found[n].append(dict(np.load(out / "rows.npz")))
        first, again = results.read(out / "a"), results.read(out / "b")
        assert first == again  # from what each process has kept of its own rows
        assert len(list((out / "kept").iterdir())) == 3 * n
        assert [row.ci95 is not None and row.n > 0 for row in first] == [True] * 3
        found[n].append({row.name: row.main for row in first})
        assert (out / "geometry.png").stat().st_size > 10_000
    for one, two in zip(found[1], found[2], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name == "key":
                assert one[name].tolist() == two[name].tolist()
            elif one[name] is None:
                assert two[name] is None
            else:
                np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_captions_of_two_processes_are_those_of_one(data, tmp_path, monkeypatch):
    config, run, spec = tmp_path / "coca.py", tmp_path / "run", f"tsv:{data}/pairs.tsv"
    config.write_text("from tests.train.tiny_hosts import coca as config  # noqa: F401\n")
    monkeypatch.setattr("tests.train.test_hosts.CONFIG", str(config))
    made = train(2, 1, data, run, "--train.steps", "5", "--evals.0.data", spec, *OVER_DATA)
    assert made[0].complained.count(f"step 5  {spec}  ") == 2
    assert spec not in made[1].complained
    assert len(list((run / "captioning").iterdir())) == 1
    (line,) = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if '"captioning"' in x]
    for n, devices in ((1, 1), (2, 2)):
        out = tmp_path / f"out{n}"
        out.mkdir()
        commands = [["eval", "captioning", str(run), "--data", spec, "--json", f"{out}/captioning.json"]]
        made = hosts.run(n, ["-c", EVALS, json.dumps(commands)], out, devices, **QUICK)
        assert made[0].said.count('"task"') == 1
        assert all(not host.said for host in made[1:])
        assert json.loads((out / "captioning.json").read_text())["metrics"] == pytest.approx(line["metrics"], rel=1e-5)
        assert (out / "captioning.png").stat().st_size > 10_000
