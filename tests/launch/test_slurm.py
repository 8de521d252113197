"""launch/slurm.sbatch against a srun that runs its tasks here, and a scancel and scontrol that are recorded."""

import re
import signal
import time

import pytest

from tests.launch.stand_ins import ROOT, Stage, prepare

TRAIN = ["configs/c.py", "--workdir", "runs/x"]


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    prepare(stage.checkout)
    stage.environment |= {"SLURM_JOB_ID": "7", "STAGE_WORKERS": "2", "SLURM_SUBMIT_DIR": str(stage.checkout)}
    return stage


def trained(stage):
    path = stage.folder / "trained"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_every_task_trains(stage):
    done = stage.run("slurm.sbatch", *TRAIN, "--data.spec", "a b", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    assert trained(stage) == [f"task.{i} train configs/c.py --workdir runs/x --data.spec a b" for i in range(2)]
    (srun,) = stage.calls("srun")
    assert "--cpus-per-task=12" in srun
    assert "CLIPJAX_RESTARTS=1\n" in (stage.folder / "trained.environment").read_text()
    assert "--kill-on-bad-exit=0" in srun
    assert stage.calls("scontrol") == []


def test_a_failure_is_repeated_by_the_task_and_then_the_jobs(stage):
    stage.play("train", "1@task.1", "75@task.1", "0")
    assert stage.run("slurm.sbatch", *TRAIN).returncode == 0
    assert len(trained(stage)) == 4
    stage.play("train", "1@task.1")
    done = stage.run("slurm.sbatch", *TRAIN, RETRIES="2")
    assert done.returncode == 1
    assert len(trained(stage)) == 4 + 3
    assert stage.calls("scontrol") == []


@pytest.mark.parametrize("status", [2, 3])
def test_what_would_fail_again_is_never_repeated(stage, status):
    stage.play("train", str(status))
    assert stage.run("slurm.sbatch", *TRAIN).returncode == status
    assert len(trained(stage)) == 2
    assert stage.calls("scontrol") == []


@pytest.mark.parametrize("status", [2, 3])
def test_no_75_of_another_task_hides_it(stage, status):
    stage.play("train", f"{status}@task.1 75")
    assert stage.run("slurm.sbatch", *TRAIN, RETRIES="2").returncode == status
    assert len(trained(stage)) == 3
    assert stage.calls("scontrol") == []


@pytest.mark.parametrize(("count", "again"), [("0", True), ("100", False)])
def test_at_the_time_limit_it_saves_and_returns_to_the_queue(stage, count, again):
    stage.play("train", "until-signal")
    job = stage.start("slurm.sbatch", *TRAIN, SLURM_RESTART_COUNT=count)
    try:
        limit = time.monotonic() + 300
        while len([*stage.folder.glob("ready.*")]) < 2:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < limit
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=300)
    finally:
        job.kill()
    assert out.count("saved") == 2
    assert job.returncode == 75, err
    assert stage.calls("scancel") == [["--signal=TERM", "7"]]
    assert stage.calls("scontrol") == ([["requeue", "7"]] if again else [])
    assert len(trained(stage)) == 2  # retry.sh leaves it to Slurm


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["configs/c.py"], {}, "--workdir RUN is needed"),
        (TRAIN, {"SLURM_JOB_ID": ""}, "sbatch launch/slurm.sbatch configs/c.py"),
        (TRAIN, {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, "--ntasks-per-node = 1 with 8 GPUs a node"),
        (TRAIN, {"SLURM_GPUS_PER_NODE": "h100:4", "SLURM_NTASKS_PER_NODE": "8"}, "--ntasks-per-node = 8 with 4 GPUs a node"),
        (TRAIN, {"SLURM_SUBMIT_DIR": "/"}, "submit from a checkout that launch/setup.sh has set up"),
    ],
)
def test_wrong_use_is_refused(stage, arguments, environment, message):
    done = stage.run("slurm.sbatch", *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert stage.calls("srun") == []


def test_what_it_asks_slurm_for():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a task for each GPU
    assert "gpus-per-task" not in asked  # a task must see them all
    assert asked["signal"] == "B:TERM@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # a requeued job appends to its log
    assert text.index("#SBATCH") < text.index("set -uo")  # Slurm reads none after the first command
