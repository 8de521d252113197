"""What the environment says of other processes, who is to blame, and real processes that die, freeze, hang or fail."""

import os
import signal
import sys
import time

import pytest

from clipjax import cli
from clipjax.config import ConfigError
from clipjax.distributed import _without_proxies, watch
from clipjax.distributed.cluster import detect
from clipjax.distributed.watch import Beat, diagnose
from tests import hosts

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
JOINED = dict(coordinator_address="h0:1234", num_processes=4, process_id=3, cluster_detection_method="deactivate")
SLURM = dict(cluster_detection_method="slurm", num_processes=4)


@pytest.mark.parametrize(
    ("env", "tpu", "how"),
    [
        ({}, False, None),
        ({}, True, dict(cluster_detection_method="gcetpu")),  # only the metadata server knows
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        (EXPLICIT, False, JOINED),
        (EXPLICIT | STEP, True, JOINED),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False, None),
        (STEP, False, SLURM),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "h0:1"}, False, SLURM | {"coordinator_address": "h0:1"}),
        (STEP | {"SLURM_STEP_NUM_NODES": "4"}, False, SLURM | {"local_device_ids": []}),  # a task a node has all its devices
        (STEP | {"CUDA_VISIBLE_DEVICES": "0"}, False, SLURM | {"local_device_ids": []}),  # bound by Slurm to one
        (STEP | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_NUM_NODES": "2"}, False, SLURM),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False, None),  # a step of one task in a job of several
        (STEP | {"SLURM_NTASKS": "1"}, False, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None),  # in a batch script, without srun
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, False, dict(cluster_detection_method="ompi")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True, dict(cluster_detection_method="gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, False, None),  # stray
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, True, None),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"},
            True,
            dict(cluster_detection_method="gketpu"),
        ),
        ({"MEGASCALE_NUM_SLICES": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
    ],
)
def test_what_the_environment_says(env, tpu, how):
    assert detect(env, tpu) == how


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h0:1234"}, "JAX_COORDINATOR_ADDRESS = 'h0:1234': is set, but not which process this is"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS = '': must be host:port of process 0, one of 4"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h0"}, "JAX_COORDINATOR_ADDRESS = 'h0': must be host:port"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID = 4: must be at least 0 and less than JAX_NUM_PROCESSES = 4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID = -1: must be at least 0"),
        (EXPLICIT | {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID = 'missing': must be a whole number: set JAX_COORDINATOR_ADDRESS"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES = 'four': must be a whole number"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES = 0: must be positive"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = '2': this Open MPI does not give the address of process 0: set"),
    ],
)
def test_a_contradiction_is_named(env, message):
    with pytest.raises(ConfigError) as caught:
        detect(env, False)
    assert str(caught.value).startswith(message)


def test_slurm_without_srun_is_said(caplog):
    assert detect({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False) is None
    assert "srun did not start this process" in caplog.text


@pytest.mark.parametrize(
    "command", [["export", "RUN", "--to", "open_clip", "--out", "out"], ["import", "--from", "open_clip", "SRC"]]
)
def test_what_one_process_does_is_refused_in_several(command, monkeypatch, capsys):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    status = cli.main([*command, *(["--out", "RUN"] if command[0] == "import" else [])])
    assert status == 2
    assert f"clipjax {command[0]} is for one process, and this is one of several: start it once" in capsys.readouterr().err


def beats(**changes):
    """Of three processes at step 8."""
    every = {i: Beat(5, f"h{i}", 8, "training", 1.0) for i in range(3)}
    return every | {int(name[1:]): every[int(name[1:])]._replace(**change) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("of", "silent", "said"),
    [
        (beats(), {}, None),
        (beats(), {1: 59}, None),
        (beats(), {1: 61}, "process 1 (h1) of 3 died or hangs: no sign of life for 61 s"),
        (
            beats(p0=dict(since=700.0)),
            {1: 61, 2: 70},
            "process 1 (h1), process 2 (h2) of 3 died or hangs: no sign of life for 70 s",
        ),
        (beats(p0=dict(since=599.0)), {}, None),
        (beats(p1=dict(step=7, since=601.0)), {}, "process 1 (h1) of 3: no progress for 601 s at step 7, training"),
        (
            beats(p0=dict(since=650.0), p2=dict(stage="reading data", since=640.0)),
            {},
            "process 2 (h2) of 3: no progress for 640 s at step 8, reading data",
        ),
        # Whoever saves or compiles has longer, and so have those that wait for it.
        (beats(p0=dict(since=2000.0), p1=dict(since=2000.0), p2=dict(stage="evaluating or saving", since=2000.0)), {}, None),
        (
            beats(p2=dict(stage="evaluating or saving", since=3601.0)),
            {},
            "process 2 (h2) of 3: no progress for 3601 s",
        ),
        # One has moved on a moment ago: the others are about to.
        (beats(p0=dict(since=700.0), p1=dict(since=700.0), p2=dict(since=3.0)), {}, None),
        (
            {i: beat._replace(since=610.0) for i, beat in beats().items()},
            {},
            "process 0 (h0), process 1 (h1), process 2 (h2) of 3: no progress for 610 s at step 8, training",
        ),
        (beats(p0=dict(stage="ending", since=9000.0), p1=dict(stage="ending", since=9000.0)), {}, None),
    ],
)
def test_who_is_to_blame(of, silent, said):
    got = diagnose(of, dict.fromkeys(of, 0.0) | silent, 60)
    assert (got is None) == (said is None)
    assert got is None or got.startswith(said)


def test_a_proxy_is_hidden_from_grpc_alone(monkeypatch):
    for name in ("HTTPS_PROXY", "http_proxy", "no_proxy"):
        monkeypatch.setenv(name, "there")
    with _without_proxies():
        assert [name for name in os.environ if "proxy" in name.lower()] == ["no_proxy"]
    assert os.environ["HTTPS_PROXY"] == os.environ["http_proxy"] == "there"


# Steps of a collective each, as training takes them.
PROGRAM = """
import os, sys, time
import jax
import numpy as np
from clipjax import config, distributed, eval_commands, status

does, who = os.environ["DOES"], 1

def work(args, wanted):
    distributed.start()
    me = jax.process_index()
    distributed.agree("the weather", "rain" if does == "disagree" and me == who else "sun")
    with distributed.first_process_first("file"):
        assert me == 0 or os.path.exists("made")
        time.sleep(0.2 * (me == 0))
        open("made", "w").close()
    if does == "refuse" and me == who:
        raise config.ConfigError("model.width = 7: must be even")
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    add = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
    for step in range(30):
        distributed.enter_stage(step, "reading data")
        if does == "hang" and me == who and step == 5:
            time.sleep(1000)
        distributed.enter_stage(step, "training")
        rows = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P("d")), np.ones(1, np.float32))
        assert add(rows) == jax.process_count() == 2
        print("step", step, file=sys.stderr, flush=True)
        time.sleep(0.1)
        if does == "fail" and me == who and step == 5:
            raise TypeError("a mistake")
        if does == "nan" and step == 5:
            raise FloatingPointError("train/loss is nan at step 5")
        if does == "bad" and me == who and step == 5:
            raise status.CertainFailure("64 others can't be read")
    assert distributed.total(me + 1) == 3
    if does == "late" and me == who:
        time.sleep(5)
    print('{"result": 1}')

eval_commands.evaluate = work
from clipjax import cli

sys.exit(cli.main(["eval", "retrieval", "RUN", "--data", "emoji"]))
"""


def ends(tmp_path, does, seconds=60, tell=None, whom=(), **env):
    """Both processes, when those that were not killed or stopped have ended; and the seconds that took since the signal."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {"CLIPJAX_HEARTBEAT_SECONDS": "3", "DOES": does} | env
    with hosts.started(2, [str(tmp_path / "program.py")], tmp_path, cwd=tmp_path, **env) as both:
        for i in whom:
            hosts.until(both, both[i].err, "step 8\n")
            both[i].signal(tell)
        start = time.monotonic()
        hosts.ended([host for i, host in enumerate(both) if i not in whom], seconds + 60)
        return both, [host.status for host in both], time.monotonic() - start


def messages(host):
    return [line for line in host.complained.splitlines() if line.startswith("clipjax: ")]


@pytest.mark.parametrize(
    ("number", "who"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone_ends_the_other_with_its_name(number, who, tmp_path):
    both, statuses, seconds = ends(tmp_path, "", tell=number, whom=[who])
    assert statuses[1 - who] == 75, hosts.report(both)
    (line,) = messages(both[1 - who])
    assert line.startswith(f"clipjax: process {who} ({os.uname().nodename}) of 2 died or hangs")
    assert seconds < 30  # 3 until it counts as dead, up to a beat and another until that is known, and a busy machine's delays


@pytest.mark.slow
def test_a_process_that_is_alive_and_stuck_is_named(tmp_path):
    both, statuses, _ = ends(tmp_path, "hang", CLIPJAX_HEARTBEAT_SECONDS="2")
    assert statuses == [75, 75], hosts.report(both)
    for host in both:
        (line,) = messages(host)
        assert line.startswith(f"clipjax: process 1 ({os.uname().nodename}) of 2: no progress for 2")
        assert line.endswith("s at step 5, reading data")


@pytest.mark.parametrize(
    ("does", "status", "message"),
    [
        ("refuse", 2, r"model.width = 7: must be even"),
        pytest.param("disagree", 2, r"the weather = 'rain': process 0 has sun: all processes need", marks=pytest.mark.slow),
        pytest.param("fail", 1, "Traceback (most recent call last):", marks=pytest.mark.slow),
        pytest.param("bad", 3, "64 others can't be read", marks=pytest.mark.slow),
        pytest.param("nan", 3, "train/loss is nan at step 5", marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_ends_all_and_is_reported_once(does, status, message, tmp_path):
    both, statuses, seconds = ends(tmp_path, does)
    assert statuses == [status, status], hosts.report(both)
    (line,) = [line for host in both for line in messages(host)]
    assert message in line
    assert does == "nan" or line.startswith("clipjax: process 1 (")
    assert seconds < 60


@pytest.mark.slow
def test_a_good_end_waits_for_the_last_and_stdout_is_the_results(tmp_path):
    both, statuses, _ = ends(tmp_path, "late", http_proxy="http://localhost:9", https_proxy="http://localhost:9")
    assert statuses == [0, 0], hosts.report(both)
    assert [host.said for host in both] == ['{"result": 1}\n'] * 2  # nothing of Gloo's
    assert not messages(both[0]) + messages(both[1])


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_that_does_not_come_is_not_waited_for_for_ever(who, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    address = f"localhost:{hosts.free_port()}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(1 - who), "DOES": ""}
    program = [str(tmp_path / "program.py")]
    with hosts.started(1, program, tmp_path, cwd=tmp_path, CLIPJAX_HEARTBEAT_SECONDS="1", **env) as (alone,):
        assert hosts.ended([alone]) == [75], hosts.report([alone])
    assert f"clipjax: the 2 processes of this run did not come within 5 s to process 0 at {address}" in alone.complained


def test_all_stages_of_a_step_have_a_place():
    assert Beat(0, "", 3, "reading data", 0).position < Beat(0, "", 3, "compiling", 0).position
    assert Beat(0, "", 3, "training", 0).position < Beat(0, "", 4, "preparing", 0).position
    assert watch.STEP_BEATS < watch.LONG_STAGE_BEATS
    assert sys.platform != "linux" or signal.SIGABRT == 6  # seconds that an abort waits: see _delay_aborts
