"""A workdir has one owner: who may take it over and when, and what a process does that has lost it."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from datetime import UTC, datetime, timedelta

import pytest

from clipjax import config, preemption, process, swap
from clipjax.train import owner
from clipjax.train.owner import LostError, Record
from tests import hosts
from tests.train import tiny, tiny_emoji

MINE = owner.new_record()
ELSEWHERE = dataclasses.replace(MINE, host="elsewhere", token="theirs")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed; `during` maps a second to what happens then."""

    class Clock:
        now = 1000.0
        during: dict = {}

        def sleep(self, seconds):
            self.now += seconds
            for when in [w for w in self.during if w <= self.now - 1000]:
                self.during.pop(when)()

    made = Clock()
    made.during = {}
    monkeypatch.setattr(owner, "clock", lambda: made.now)
    monkeypatch.setattr(owner, "time", types.SimpleNamespace(sleep=made.sleep))
    return made


def put(workdir, record):
    workdir.mkdir(exist_ok=True)
    (workdir / "owner.json").write_bytes(record.content())


def found(workdir):
    return owner.parse(swap.read(workdir / "owner.json").content)


@pytest.fixture
def restarts(monkeypatch):
    monkeypatch.setenv("CLIPJAX_RESTARTS", "1")


def test_what_owner_json_says(tmp_path):
    held = owner.claim(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "owner.json").read_text())
    assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
    assert datetime.now(UTC) - datetime.fromisoformat(said["start"]) < timedelta(minutes=1)
    assert said["beat"][:10] in (said["start"][:10], str(datetime.now(UTC).date()))
    held.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_live_owner_ends_the_second_job(tmp_path, clock):
    held = owner.claim(tmp_path)
    before = found(tmp_path)
    with pytest.raises(preemption.OwnedError) as refused:
        owner.claim(tmp_path)
    assert refused.value.status == 2
    for part in (str(tmp_path), socket.gethostname(), str(os.getpid()), before.start, "kill", "--workdir"):
        assert part in str(refused.value)
    assert found(tmp_path) == before
    held.release()
    owner.claim(tmp_path).release()


def test_a_launcher_is_asked_to_try_again(tmp_path, restarts):
    put(tmp_path, MINE)
    with pytest.raises(preemption.OwnedError) as refused:
        owner.claim(tmp_path)
    assert refused.value.status == 75


@pytest.mark.parametrize(
    "of",
    [
        dict(pid=2**22 + 1),
        dict(birth="1"),
        dict(pid=1, birth="never"),
        dict(machine="", pid=2**22 + 1),
    ],
    ids=["no such process", "the number is another's now", "pid 1 of a container that is gone", "unknown container"],
)
def test_a_dead_process_of_this_host_is_followed_at_once(tmp_path, clock, capsys, of):
    put(tmp_path, dataclasses.replace(MINE, **of))
    held = owner.claim(tmp_path)
    assert clock.now == 1000
    assert found(tmp_path).token not in ("", MINE.token)
    assert f"{tmp_path}: taken over from process {of.get('pid', MINE.pid)} on" in capsys.readouterr().err
    held.release()


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_process_that_was_not_waited_for_is_dead(tmp_path, clock, monkeypatch, platform):
    """On macOS `ps` knows it, as here."""
    monkeypatch.setattr(process, "sys", types.SimpleNamespace(platform=platform))
    assert process.birth(os.getpid()) == process.birth(os.getpid()) != ""
    with subprocess.Popen(["sleep", "60"]) as child:
        put(tmp_path, dataclasses.replace(MINE, pid=child.pid, birth=process.birth(child.pid), machine=process.machine()))
        with pytest.raises(preemption.OwnedError):
            owner.claim(tmp_path)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        owner.claim(tmp_path).release()
    assert clock.now == 1000


@pytest.mark.parametrize(
    "record",
    [
        ELSEWHERE,
        dataclasses.replace(MINE, machine="another boot"),  # of the same name, as pods of one node, with other process ids
        dataclasses.replace(ELSEWHERE, beat="2999-01-01T00:00:00+00:00"),  # its clock is wrong
        dataclasses.replace(ELSEWHERE, beat=(datetime.now(UTC) - timedelta(hours=14)).isoformat()),  # its time zone is wrong
        Record(),  # the file is damaged
        Record(host=MINE.host),
    ],
    ids=["another host", "another container", "clock", "time zone", "damaged", "no process"],
)
def test_another_host_must_miss_three_beats(tmp_path, clock, capsys, record):
    put(tmp_path, record)
    owner.claim(tmp_path).release()
    assert 1090 <= clock.now <= 1092
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("taken over in ")[2][:4] for line in said[:-1]] == ["90 s", "60 s", "30 s"]
    assert said[-1].endswith("which gave no sign of life for 90 s")


def test_a_damaged_file_is_no_reason_to_fail(tmp_path, clock):
    for content in (b"", b"[1]", b"7", b'{"host": "elsewhere", "pid": "x"}', b'{"host"'):
        (tmp_path / "owner.json").write_bytes(content)
        assert owner.parse(content) == Record()
    owner.claim(tmp_path).release()
    assert clock.now >= 1090


def test_a_beat_of_long_ago_needs_no_watching(tmp_path, clock):
    put(tmp_path, dataclasses.replace(ELSEWHERE, beat=(datetime.now(UTC) - timedelta(days=2)).isoformat()))
    owner.claim(tmp_path).release()
    assert clock.now == 1000


def test_a_sign_of_life_ends_the_second_job(tmp_path, clock):
    put(tmp_path, ELSEWHERE)
    clock.during[50] = lambda: put(tmp_path, dataclasses.replace(ELSEWHERE, beat="now"))
    with pytest.raises(preemption.OwnedError, match="elsewhere"):
        owner.claim(tmp_path)
    assert clock.now < 1053
    assert found(tmp_path).token == "theirs"


def test_an_owner_that_ends_meanwhile_is_followed(tmp_path, clock):
    put(tmp_path, ELSEWHERE)
    clock.during[20] = (tmp_path / "owner.json").unlink
    owner.claim(tmp_path).release()
    assert clock.now < 1023


@pytest.mark.parametrize("record", [dataclasses.replace(MINE, pid=2**22 + 1), None], ids=["after a dead one", "fresh"])
def test_of_several_that_come_at_once_one_goes_on(tmp_path, record):
    if record:
        put(tmp_path, record)
    results, gate = [], threading.Barrier(5)

    def attempt():
        gate.wait()
        try:
            results.append(owner.claim(tmp_path))
        except preemption.OwnedError as error:
            results.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [x for x in results if isinstance(x, owner.Owner)]
    assert (len(held), len(results)) == (1, 5)
    assert found(tmp_path) == held[0]._record
    held[0].release()


def test_the_beat_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "EVERY", 0.05)
    monkeypatch.setattr(owner, "_now", lambda *_: str(time.monotonic()))
    held = owner.claim(tmp_path)
    beats = set()
    deadline = time.monotonic() + 20
    while len(beats) < 4 and time.monotonic() < deadline:
        beats.add(found(tmp_path).beat)
        time.sleep(0.01)
    held.check(look=True)
    held.release()
    assert len(beats) == 4
    assert list(tmp_path.iterdir()) == []


def test_who_was_silent_finds_out_before_it_writes(tmp_path, clock):
    held = owner.claim(tmp_path)
    clock.now += 61
    held.check(look=True)  # renewed
    put(tmp_path, ELSEWHERE)
    held.check(look=True)  # nobody takes over before a beat is missing, so it does not look
    clock.now += 61
    held.check(look=False)
    with pytest.raises(LostError, match=f"^{tmp_path} was taken over by process {os.getpid()} on elsewhere, since "):
        held.check(look=True)
    with pytest.raises(LostError):
        held.check(look=False)
    held.release()
    assert found(tmp_path) == ELSEWHERE  # left alone


def test_a_file_that_a_person_removed_comes_back(tmp_path, clock):
    held = owner.claim(tmp_path)
    (tmp_path / "owner.json").unlink()
    clock.now += 61
    held.check(look=True)
    assert found(tmp_path).token == held._record.token
    held.release()


def test_a_beat_that_can_not_be_written_is_no_end(tmp_path, clock, monkeypatch, caplog):
    held = owner.claim(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(swap, "swap", full)
        clock.now += 1000
        held.check(look=True)
    assert "not renewed, will be tried again" in caplog.text
    held.check(look=True)
    held.release()
    assert not list(tmp_path.iterdir())


RUN = tiny.run(train=config.Train(steps=8, batch_size=16, log_every=1, checkpoint_every=4, keep=9))


def run_it(workdir, at=None, do=None):
    """Trains; something happens while the batch of step `at` is read."""

    def read(start):
        for step, batch in enumerate(tiny.batches(RUN, 8)[start:], start):
            if step == at:
                do()
            yield batch | tiny.marks(16)

    return tiny.train_in(workdir, RUN, lambda start: contextlib.nullcontext(read(start)), [], tiny.mesh_of())


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_lost_its_workdir_changes_nothing_there(tmp_path, clock):
    """As after minutes of sleep, in which another host took over."""
    workdir, before = tmp_path / "run", {}

    def lose():
        while not (workdir / "checkpoints" / "4").exists():  # its writing goes on meanwhile
            time.sleep(0.01)
        put(workdir, ELSEWHERE)
        clock.now += 300
        before.update(content(workdir))

    with pytest.raises(LostError, match=f"^{workdir} was taken over by process .* on elsewhere"):
        run_it(workdir, 6, lose)
    after = content(workdir)
    events = {name for name in after if name.startswith("tensorboard/")}  # of this process alone
    assert {k: v for k, v in after.items() if k not in events} == {k: v for k, v in before.items() if k not in events}
    clock.now += 1
    (workdir / "owner.json").unlink()
    run_it(workdir)
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [*range(1, 9)]


def test_a_run_that_fails_gives_its_workdir_back(tmp_path):
    def fail():
        seen.append(found(tmp_path / "run"))
        raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):
        run_it(tmp_path / "run", 1, fail)
    assert seen[0].pid == os.getpid()
    assert not (tmp_path / "run" / "owner.json").exists()


def owned_until(error, workdir, do):
    with owner.owned(workdir):
        do()
        raise error


def test_an_error_after_the_loss_tells_of_the_loss(tmp_path, clock):
    """Such as Orbax's, where the new owner has removed what this process was writing."""

    def lose():
        put(tmp_path, ELSEWHERE)
        clock.now += 300

    with pytest.raises(LostError) as lost:
        owned_until(FileNotFoundError(), tmp_path, lose)
    assert isinstance(lost.value.__cause__, FileNotFoundError)


def test_what_was_not_begun_leaves_no_folder(tmp_path):
    workdir, seen = tmp_path / "runs" / "one", []
    with pytest.raises(config.ConfigError):
        owned_until(config.ConfigError(), workdir, lambda: seen.append(found(workdir)))
    assert seen[0].pid == os.getpid()
    assert not list(tmp_path.iterdir())
    with pytest.raises(config.ConfigError):
        owned_until(config.ConfigError(), workdir, (workdir / "file").touch)
    assert [p.name for p in workdir.iterdir()] == ["file"]


@pytest.mark.slow
def test_two_jobs_that_start_together(tmp_path):
    """Of two configurations one trains, and the other ends without a trace. After kill -9 the same command goes on at once."""
    workdir = tmp_path / "run"
    environment = os.environ | hosts.STRICT | {"CLIPJAX_RESTARTS": "0"}

    def start(seed, steps):
        options = ["--seed", str(seed), "--train.steps", str(steps), "--train.checkpoint_every", "1000000", "--evals", "none"]
        command = [sys.executable, *hosts.CLI, "train", tiny_emoji.__file__, "--workdir", str(workdir), *options]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    with start(0, 1_000_000) as one, start(1, 1_000_000) as other:
        try:
            while one.poll() is other.poll() is None:
                time.sleep(0.05)
            winner, loser = (one, other) if one.poll() is None else (other, one)
            assert loser.wait() == 2
            assert f"clipjax: {workdir} is being trained by process {winner.pid} on " in loser.stderr.read()
            assert found(workdir).pid == winner.pid
        finally:
            one.kill()
            other.kill()
    assert winner.returncode == -signal.SIGKILL
    assert found(workdir).pid == winner.pid
    seed = 0 if winner is one else 1
    with start(seed, 20) as again:
        _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"{workdir}: taken over from process {winner.pid} on " in said
    assert json.loads((workdir / "config.json").read_text())["seed"] == seed
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["20"]
    assert not [name for name in content(workdir) if "owner" in name]
