"""Asked to stop, a run saves at the next step and the same command goes on: real signals, damaged files and full disks."""

import contextlib
import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from clipjax import config, preemption
from clipjax.storage import DamagedError, SaveError
from tests import hosts
from tests.train import tiny
from tests.train.test_resume import same_weights

TRAIN = config.Train(steps=12, batch_size=16, log_every=1, checkpoint_every=4, keep=9)
RUN = tiny.run(train=TRAIN)
LONG = dataclasses.replace(RUN, train=dataclasses.replace(TRAIN, steps=60, checkpoint_every=1000))


# Where one array fails, Orbax leaves the coroutines of the others to the garbage collector, which complains of them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """So that it complains here, and not in another file's test."""
    yield
    gc.collect()


def batches(at=None, do=None, run=RUN):
    """The same examples for every start; something happens while the batch of step `at` is read."""

    def read(start):
        for step, batch in enumerate(tiny.batches(run, run.train.steps)[start:], start):
            if step == at:
                do()
            yield batch | tiny.marks(16)

    return lambda start: contextlib.nullcontext(read(start))


def run_it(workdir, at=None, do=None, evaluators=(), run=RUN):
    return tiny.train_in(workdir, run, batches(at, do, run), list(evaluators), tiny.mesh_of(2))


def send(*numbers):
    """This process gets signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def settle(folder):
    """Waits until no file comes or goes any more: Orbax's threads outlive a save that has failed, until their process ends."""
    before = None
    while before != (now := list(os.walk(folder))):
        before = now
        time.sleep(1)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def written(workdir):
    """The lines of metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = {"examples_per_second", "data_wait", "save_seconds", "eval_seconds", "useful_share"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@dataclasses.dataclass
class Evaluator:
    """A mean of the weights, every 6 steps; `during` happens between two of its batches."""

    task: str = "zeroshot_retrieval"
    dataset: str = "emoji/test"
    during: object = None
    runs: list = dataclasses.field(default_factory=list)

    def due(self, step):
        return step % 6 == 0

    def run(self, params, step):
        self.runs.append(step)
        preemption.check()
        if self.during:
            self.during()
        preemption.check()
        return {"mean": float(np.mean(params["text"]["tokens"]))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Of a run that nothing stopped: its state and its workdir."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_it(workdir, evaluators=[Evaluator(), Evaluator(dataset="emoji/train")]), workdir


@pytest.mark.parametrize(
    ("numbers", "status", "word"),
    [((signal.SIGTERM,) * 3, 75, "preempted"), ((signal.SIGINT,), 130, "interrupted")],
)
def test_a_signal_saves_at_the_next_step(tmp_path, uninterrupted, numbers, status, word):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(preemption.Preempted, match=f"^{word} at step 7: saved; the same command goes on$") as stopped:
        run_it(tmp_path, 6, send(*numbers))
    assert stopped.value.status == status
    assert steps_on_disk(tmp_path) == [4, 7]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert same(run_it(tmp_path), uninterrupted[0])
    assert written(tmp_path) == [line for line in written(uninterrupted[1]) if "loss" in line]
    assert steps_on_disk(tmp_path) == [4, 7, 8, 12]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_it(tmp_path, 6, send(signal.SIGINT, signal.SIGINT))
    assert steps_on_disk(tmp_path) == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_first_step_there_is_nothing_to_wait_for(tmp_path):
    """Restoring and compiling take minutes in large runs: a signal ends them at once. Only owner.json must go, also while the
    main thread is in a function of C that calls no handler, as a compiler is."""
    code = f"""
import hashlib
from pathlib import Path
from clipjax.train import owner
with owner.owned(Path({str(tmp_path / "run")!r})):
    print(flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert (tmp_path / "run" / "owner.json").exists()
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    assert not (tmp_path / "run" / "owner.json").exists()


def test_a_child_has_signals_of_its_own(tmp_path):
    """A forked process that is ended does not end its parent, also if that comes before Python runs in it."""
    calls = []
    ready, started = os.pipe()
    with preemption.before_sigterm(lambda: calls.append(1)):
        if not (child := os.fork()):
            os.write(started, b"x")
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        os.close(started)
        if os.read(ready, 1):  # it started, so the first signal may have come too early, which Python then forgets
            os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.2)
    os.close(ready)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert calls == []


def test_a_step_that_is_saved_anyway_is_saved_once(tmp_path):
    with pytest.raises(preemption.Preempted, match="at step 8: saved"):
        run_it(tmp_path, 7, send(signal.SIGTERM))
    assert steps_on_disk(tmp_path) == [4, 8]


@pytest.mark.parametrize("step", [6, 12])
def test_no_evaluation_is_waited_for_and_none_is_lost(tmp_path, uninterrupted, step):
    """Step 12 is the last: all is trained, and still the run has not finished."""
    during = send(signal.SIGTERM)
    first, second = Evaluator(), Evaluator(dataset="emoji/train", during=lambda: during() if second.runs[-1] == step else None)
    third = Evaluator(task="geometry")
    with pytest.raises(preemption.Preempted, match=f"at step {step}: saved"):
        run_it(tmp_path, evaluators=[first, second, third])
    assert (first.runs[-1], second.runs[-1], third.runs[-1:]) == (step, step, [6] if step == 12 else [])
    assert max(steps_on_disk(tmp_path)) == step
    first, second = Evaluator(), Evaluator(dataset="emoji/train")
    state = run_it(tmp_path, evaluators=[first, second])
    assert first.runs == ([12] if step == 6 else [])
    assert second.runs == ([6, 12] if step == 6 else [12])
    assert same(state, uninterrupted[0])
    assert [x for x in written(tmp_path) if x.get("task") != "geometry"] == written(uninterrupted[1])


def test_no_evaluation_starts_after_a_signal(tmp_path):
    evaluator = Evaluator()
    with pytest.raises(preemption.Preempted, match="at step 6"):
        run_it(tmp_path, 5, send(signal.SIGTERM), [evaluator])
    assert evaluator.runs == []


@pytest.mark.slow
def test_a_thread_has_no_signals_and_trains_all_the_same(tmp_path, uninterrupted):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_it(tmp_path)))
    thread.start()
    thread.join()
    assert same(results[0], uninterrupted[0])
    assert not preemption.requested()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def files(step, pattern):
    """Largest first."""
    return sorted(step.glob(pattern), key=lambda p: -p.stat().st_size)


DAMAGES = {  # what happened to the newest checkpoint
    "array truncated": lambda step: truncate(files(step, "params/ocdbt.process_0/d/*")[0]),
    "array gone": lambda step: files(step, "training/ocdbt.process_0/d/*")[0].unlink(),
    "index truncated": lambda step: truncate(step / "training" / "manifest.ocdbt"),
    "index zeros": lambda step: (step / "params" / "manifest.ocdbt").write_bytes(bytes(100)),
    "metadata gone": lambda step: (step / "training" / "_METADATA").unlink(),
    "configuration truncated": lambda step: truncate(step / "config" / "metadata"),
    "configuration gone": lambda step: shutil.rmtree(step / "config"),
    "weights gone": lambda step: shutil.rmtree(step / "params"),
    "everything gone": lambda step: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in step.iterdir()],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that was stopped at step 9."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(preemption.Preempted, match="at step 9"):
        run_it(workdir, 8, send(signal.SIGTERM))
    return workdir


def damaged_copy(stopped, workdir, damages):
    """Of the stopped run, with something done to some steps; returns what is in their folders then."""
    shutil.copytree(stopped, workdir)
    for step, name in damages.items():
        DAMAGES[name](workdir / "checkpoints" / str(step))
    return {step: content(workdir / "checkpoints" / str(step)) for step in (4, 8, 9)}


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


QUICK = ("array truncated", "metadata gone", "configuration truncated")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(tmp_path, uninterrupted, stopped, caplog, name):
    workdir = tmp_path / "run"
    before = damaged_copy(stopped, workdir, {9: name})
    assert same(run_it(workdir), uninterrupted[0])
    assert content(workdir / "damaged" / "9.0") == before[9]
    assert {step: content(workdir / "checkpoints" / str(step)) for step in (4, 8)} == {step: before[step] for step in (4, 8)}
    assert steps_on_disk(workdir) == [4, 8, 12]
    assert written(workdir) == [line for line in written(uninterrupted[1]) if "loss" in line]
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "root"]
    assert warning.startswith(f"{workdir}@9 can't be read: ")
    assert warning.endswith(f"; it was moved to {workdir / 'damaged' / '9.0'}")


@pytest.mark.slow
def test_two_in_a_row_and_one_that_was_damaged_before(tmp_path, uninterrupted, stopped):
    workdir = tmp_path / "run"
    damaged_copy(stopped, workdir, {9: "array truncated", 8: "configuration truncated"})
    (workdir / "damaged" / "9.0").mkdir(parents=True)
    assert same(run_it(workdir), uninterrupted[0])
    assert sorted(p.name for p in (workdir / "damaged").iterdir()) == ["8.0", "9.0", "9.1"]


def test_where_all_are_damaged_nothing_begins_anew(tmp_path, stopped):
    workdir = tmp_path / "run"
    damaged_copy(stopped, workdir, {9: "array truncated", 8: "index truncated", 4: "configuration truncated"})
    for _ in range(2):  # also when a launcher tries again
        with pytest.raises(DamagedError, match=r"none of its checkpoints can be read \(.*\)\. Remedy: .* begin at step 0"):
            run_it(workdir)
    assert len(written(workdir)) == 9
    shutil.copytree(stopped / "checkpoints" / "8", workdir / "checkpoints" / "8")
    run_it(workdir)
    assert steps_on_disk(workdir)[-1] == 12


@pytest.mark.parametrize("said", ["UNAVAILABLE: no route to host", "PERMISSION_DENIED: Error reading NOT_FOUND"])
def test_a_storage_that_does_not_answer_is_no_damage(tmp_path, stopped, monkeypatch, said):
    import orbax.checkpoint as ocp

    workdir = tmp_path / "run"
    before = damaged_copy(stopped, workdir, {})
    restore = ocp.CheckpointManager.restore

    def fails(self, step, args):
        if "params" in dict(args.items()):
            raise ValueError(said)
        return restore(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    with pytest.raises(ValueError, match=said):
        run_it(workdir)
    assert {step: content(workdir / "checkpoints" / str(step)) for step in (4, 8, 9)} == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size, to be changed at will."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(kilobytes, *more):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*more, f"size={kilobytes}k"]), "tmpfs", folder]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not size(100_000):
        pytest.skip("no file system can be mounted here")
    yield folder, lambda kilobytes: size(kilobytes, "remount")
    subprocess.run(["umount", "--lazy", folder], check=True)


def used(folder):
    """Kilobytes."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


@pytest.mark.slow
def test_a_full_disk_costs_no_earlier_checkpoint(small_disk, uninterrupted):
    """The checkpoint of step 8 finds room for a half of it; that of 4 is there, and complete."""
    folder, resize = small_disk
    workdir, kept = folder / "run", {}

    def fill():
        while not (workdir / "checkpoints" / "4").exists():  # its writing goes on meanwhile
            time.sleep(0.01)
        kept.update(content(workdir / "checkpoints" / "4"))
        assert resize(used(folder) + sum(map(len, kept.values())) // 2048)

    with pytest.raises(OSError, match="No space left on device") as full:  # most often a SaveError; metrics may find out first
        run_it(workdir, 6, fill)
    assert f"the last good checkpoint is {workdir}@4. Remedy: make room there" in str(full.value)
    assert content(workdir / "checkpoints" / "4") == kept
    assert resize(100_000)
    settle(workdir / "checkpoints")
    assert same(run_it(workdir), uninterrupted[0])
    assert written(workdir) == [line for line in written(uninterrupted[1]) if "loss" in line]
    assert steps_on_disk(workdir) == [4, 8, 12]  # what was half written is gone


def test_a_disk_that_is_full_from_the_start_has_no_good_checkpoint(small_disk):
    folder, resize = small_disk
    with pytest.raises(OSError, match=f"no checkpoint had been written to {folder / 'run'}. Remedy"):
        run_it(folder / "run", 2, lambda: resize(used(folder) + 200))


@pytest.mark.slow
def test_metrics_on_a_full_disk(small_disk):
    """Between two checkpoints: the last good one is named, and nothing is lost but the steps since."""
    folder, resize = small_disk
    workdir, run = folder / "run", dataclasses.replace(RUN, train=dataclasses.replace(TRAIN, steps=40, checkpoint_every=5))
    stopper = dataclasses.replace(run, train=dataclasses.replace(run.train, checkpoint_every=1000))
    with pytest.raises(preemption.Preempted):
        run_it(workdir, 4, send(signal.SIGTERM), run=run)
    with pytest.raises(OSError, match="; the last good checkpoint is") as full:
        run_it(workdir, 7, lambda: resize(used(folder)), run=stopper)
    assert full.value.errno is None  # else the command line would take it for a file that the user named
    assert str(full.value).startswith(f"{workdir}: ")
    assert f"{workdir}@5. Remedy" in str(full.value)
    assert resize(100_000)
    state = run_it(workdir, run=run)
    assert same(state, run_it(folder / "straight", run=run))
    assert written(workdir) == written(folder / "straight")


def test_a_limit_on_the_size_of_files(tmp_path, uninterrupted):
    """Needs no mount: the kernel refuses longer files, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        while not (tmp_path / "checkpoints" / "4").exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(SaveError, match=r"\(File too large\); the last good checkpoint is .*@4\. Remedy"):
            run_it(tmp_path, 6, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    settle(tmp_path / "checkpoints")
    assert same(run_it(tmp_path), uninterrupted[0])


# A run that goes on until it is stopped, and then for as many steps as it is asked for.
ENDLESS = """
from tests.train.tiny_emoji import config as tiny
import dataclasses
from clipjax.config import Constant

def config():
    run = tiny()
    train = dataclasses.replace(run.train, steps=100_000, checkpoint_every=100_000, log_every=1)
    return dataclasses.replace(run, train=train, optim=dataclasses.replace(run.optim, schedule=Constant(warmup=10)), evals=())
"""


def command(folder, workdir, *overrides):
    (folder / "endless.py").write_text(ENDLESS)
    return [*hosts.CLI, "train", str(folder / "endless.py"), "--workdir", str(workdir), *overrides]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "whom"), [(1, "all"), (2, "one"), (2, "all")], ids=["alone", "one of two", "both"])
def test_processes_stop_at_the_same_step(tmp_path, n, whom):
    workdir = tmp_path / "run"
    with hosts.started(n, command(tmp_path, workdir), tmp_path / "first") as all_of_them:
        hosts.until(all_of_them, workdir / "metrics.jsonl", '"step": 20,')
        for host in all_of_them[1:] if whom == "one" else all_of_them:
            host.signal(signal.SIGTERM)
        assert hosts.ended(all_of_them) == [75] * n, hosts.report(all_of_them)
    (step,) = steps_on_disk(workdir)
    assert f"preempted at step {step:,}: saved; the same command goes on" in all_of_them[0].complained
    assert max(hosts.losses(workdir)) == step
    if (n, whom) != (2, "all"):
        return
    more = ("--train.steps", str(step + 20))
    resumed = hosts.run(n, command(tmp_path, workdir, *more), tmp_path / "second")
    assert f"resuming at step {step:,} of {step + 20:,}" in resumed[0].complained
    hosts.run(n, command(tmp_path, tmp_path / "straight", *more), tmp_path / "third")
    assert hosts.losses(workdir) == hosts.losses(tmp_path / "straight")
    assert same_weights(workdir, tmp_path / "straight")
