"""`--profile`: the trace is one of exactly the asked steps, wherever the run starts and ends, and never ends the run.

The traces are made by a program of their own: where another test has loaded libtpu, which is newer than the tests' JAX, the
profiler would end this one.
"""

import contextlib
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipjax import cli
from clipjax.train.profiling import Profile
from tests.conftest import CACHE
from tests.train import tiny_emoji

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, pathlib, sys
import jax
from clipjax import preemption
from clipjax.train import loop
from clipjax.train.workdir import open_workdir
from tests.train import tiny
from tests.train.test_loop import RUN, Evaluator, batches

def train(folder, profile, steps=6, evaluators=()):
    run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, steps=steps, checkpoint_every=2))
    mesh = tiny.mesh_of()
    with open_workdir(run, folder, mesh) as workdir:
        return loop.train(run, workdir, batches(), evaluators, mesh, profile=profile)

out = pathlib.Path(sys.argv[1])
train(out / "run", range(2, 4))
train(out / "run", range(3, 20), steps=8)  # resumes at 6, within the range, and ends before the range does
try:
    train(out / "stopped", range(1, 6), evaluators=[Evaluator([preemption.Preempted("")], every=4)])
except preemption.Preempted:
    pass
jax.profiler.start_trace(str(out / "other"))  # so that the run can't start its own
assert int(train(out / "busy", range(2, 4)).step) == 6
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of the runs, and what the program printed."""
    folder = tmp_path_factory.mktemp("profiled")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    process = subprocess.run([sys.executable, "-c", PROGRAM, folder], env=env, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder, process.stderr.splitlines()


def traced(workdir):
    """Folder -> the steps of its trace, as Perfetto reads them. TensorBoard reads the other file."""
    found = {}
    for folder in (workdir / "profile" / "plugins" / "profile").glob("*"):
        (planes,), (trace,) = folder.glob("0-*.xplane.pb"), folder.glob("0-*.trace.json.gz")
        assert planes.stat().st_size
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})]
        found[folder.name] = sorted(steps)
    return found


def test_the_trace_holds_the_steps_that_were_asked_for(done):
    folder, said = done
    assert traced(folder / "run") == {"2-4": [2, 3], "6-8": [6, 7]}
    lines = [line for line in said if line.startswith("profile of steps")]
    path = folder / "run" / "profile"
    assert lines[0].startswith(f"profile of steps 2:4: {path}/plugins/profile/2-4; open it with `tensorboard --logdir {path}`")


def test_a_stopped_run_writes_what_it_has_traced(done):
    assert traced(done[0] / "stopped") == {"1-4": [1, 2, 3]}


def test_a_profiler_that_fails_does_not_end_the_run(done):
    folder, said = done
    assert [line for line in said if "the run goes on without a profile" in line and "--profile 2:4: RuntimeError: " in line]
    assert not (folder / "busy" / "profile").exists()


def test_a_range_that_is_finished_is_told(tmp_path, capsys):
    """As where a launcher starts the same command again."""
    with Profile(range(2, 4), 8, tmp_path, contextlib.nullcontext) as profile, profile.step(8):
        pass
    assert capsys.readouterr().err == "--profile 2:4: nothing to trace: 8 steps are finished\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("4:4", "'4:4' must be FROM:TO"), ("5:4", "must be FROM:TO"), ("-1:4", "must be FROM:TO"), ("4", "must be FROM:TO"),
        ("4:", "must be FROM:TO"), ("a:b", "must be FROM:TO with whole numbers"), ("1:2:3", "must be FROM:TO"),
        ("6:9", "--profile = '6:9': must begin before train.steps = 6"),
    ],
)  # fmt: skip
def test_a_wrong_range_is_refused_before_anything_runs(text, remedy, tmp_path, capsys):
    command = ["train", tiny_emoji.__file__, "--workdir", str(tmp_path / "run"), f"--profile={text}", "--train.steps", "6"]
    command += ["--optim.schedule.warmup", "2"]
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
