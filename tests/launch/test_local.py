"""launch/local.sh with stand-ins for `clipjax`: numbers, output, signals, and the status of the worst."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "CLIPJAX_HEARTBEAT_SECONDS": "-28"}  # and 30: two seconds for the others
PROCESS = """
me=$JAX_PROCESS_ID
echo "this is $me of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"
"""


def local(n, script):
    command = ["bash", str(LOCAL), str(n), "bash", "-c", PROCESS + script]
    return subprocess.Popen(command, env=ENV, stdout=-1, stderr=-1, text=True)


def test_each_process_has_its_number_and_the_first_prints_as_if_alone():
    process = local(3, "exit 0")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    (address,) = {line.split(" at ")[1] for line in [*out.splitlines(), *err.splitlines()]}
    assert address.startswith("127.0.0.1:")
    assert out == f"this is 0 of 3 at {address}\n"
    assert sorted(err.splitlines()) == [f"[{i}] this is {i} of 3 at {address}" for i in (1, 2)]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit $((me * 75))", 75),
        ("[ $me = 0 ] && exit 75; exit 1", 1),
        ("[ $me = 1 ] && exit 2; exit 3", 2),
        ("[ $me = 1 ] && exit 3; exit 139", 3),
    ],
)
def test_the_worst_status_counts(script, status):
    process = local(2, script)
    process.communicate(timeout=60)
    assert process.returncode == status


def test_a_process_that_dies_ends_the_others_after_a_while():
    process, start = local(2, "[ $me = 1 ] && kill -KILL $$; sleep 1000"), time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert 1 < time.monotonic() - start < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_all(number):
    process = local(2, "trap 'echo got $me; exit 75' TERM INT; echo ready; for i in $(seq 300); do sleep 0.1; done")
    said = ""
    while "ready" not in said:
        said = process.stdout.readline()
    time.sleep(1)  # the other has its trap too
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "got 0" in out
    assert "[1] got 1" in err


@pytest.mark.parametrize("arguments", [[], ["x", "true"], ["0", "true"], ["2"]])
def test_wrong_use_is_refused(arguments):
    done = subprocess.run(["bash", str(LOCAL), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh N COMMAND...")
