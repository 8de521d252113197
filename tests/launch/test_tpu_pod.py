"""launch/tpu_pod.sh and launch/tpu_worker.sh against a gcloud whose machines are folders."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.stand_ins import ROOT, Stage, parsed

TWO = {"STAGE_WORKERS": "2"}  # machines a slice, rather than one
POD = ["--project", "p", "--zone", "z", "--name", "pod", "--type", "v5litepod-16", "--workdir", "gs://b/run"]
TRAIN = ["configs/c.py", "--train.steps", "10"]
RUN_STEPS = ["create", "scp", "install", "start", "follow", "wait", "delete"]


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    stage.commit()
    yield stage
    stage.close()


def trained(stage):
    path = stage.folder / "trained"
    return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.mark.parametrize("option", ["project", "zone", "name", "type", "workdir"])
def test_what_is_missing_is_asked_for_by_name(stage, option):
    at = POD.index(f"--{option}")
    done = stage.run("tpu_pod.sh", "run", *POD[:at], *POD[at + 2 :], *TRAIN)
    assert done.returncode == 2
    assert f"--{option}, or CLIPJAX_{option.upper()}: " in done.stderr
    assert done.stderr.count("CLIPJAX_") == 1
    assert stage.calls("gcloud") == []
    names = [f"CLIPJAX_{option[2:].upper()}" for option in POD[::2]]
    dry = stage.run("tpu_pod.sh", "run", "--dry-run", *TRAIN, **dict(zip(names, POD[1::2], strict=True)))
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *POD], "CONFIG.py"),
        (["train", *POD[:6], *TRAIN], "--workdir"),
        (["run", *POD, "--workdir", "runs/x", *TRAIN], "--workdir = 'runs/x': must be gs://BUCKET/RUN"),
        (["run", *POD, "--type", "v9-8", *TRAIN], "--type = 'v9-8': its software version is not known"),
        (["create", *POD, "--type", "v9-8"], "--type = 'v9-8': its software version is not known"),
        (["run", *POD, "--slices", "two", *TRAIN], "--slices = 'two': must be a whole number"),
        (["run", *POD, "--env", "A", *TRAIN], "--env = 'A': must be NAME=VALUE"),
        (["run", *POD, "--spots", *TRAIN], "unknown option --spots"),
        (["run", *POD, "--zone"], "--zone: needs a value"),
        (["destroy"], "no command destroy"),
    ],
)
def test_wrong_use_is_refused(stage, arguments, message):
    done = stage.run("tpu_pod.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert stage.calls("gcloud") == []


def refused(stage, *train):
    done = stage.run("tpu_pod.sh", "run", *POD, *train)
    assert (done.returncode, done.stdout, stage.calls("gcloud")) == (2, "", []), done.stderr
    return done.stderr


def test_no_machines_are_requested_for_a_config_that_the_workers_would_lack(stage):
    for name in ("none.py", "configs/none.py", "/elsewhere/c.py"):
        assert f"CONFIG.py = '{name}': there is no such file in {stage.checkout}, the checkout" in refused(stage, name)
    assert "NAME = 'clip_b99': there is no such packaged config; there are c " in refused(stage, "clip_b99")
    (stage.checkout / "mine.py").write_text("def config(): ...\n")
    assert "CONFIG.py = 'mine.py': is not committed, and the workers get what is committed: git add mine.py" in refused(
        stage, "mine.py"
    )
    (stage.checkout / "configs" / "c.py").write_text("def config(): pass\n")
    for name in ("configs/c.py", "c", "./configs/c.py"):
        assert "has changes that are not committed" in refused(stage, name)


def test_no_machines_are_requested_for_a_command_that_clipjax_refuses(stage):
    """Where this machine has clipjax; what is looked at is what the workers get."""
    python = stage.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\nPYTHONPATH={ROOT}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = (ROOT / "configs" / "emoji_clip.py").read_text()
    (stage.checkout / "configs" / "c.py").write_text(config)
    (stage.checkout / "configs" / "broken.py").write_text("import neighbour\n" + config)
    (stage.checkout / ".gitignore").write_text(".venv\nneighbour.py\n")
    (stage.checkout / "configs" / "neighbour.py").touch()
    stage.commit()
    assert "configs/broken.py, line 1: ModuleNotFoundError: No module named 'neighbour'" in refused(stage, "configs/broken.py")
    said = refused(stage, "configs/c.py", "--train.step", "4")
    assert "--train.step: there is no such field" in said
    assert "no machines were requested" in said
    assert stage.run("tpu_pod.sh", "run", "--dry-run", *POD, "configs/c.py", "--seed", "1").returncode == 0


def test_what_is_not_committed_is_named_before_machines_are_requested(stage):
    assert "Not committed" not in stage.run("tpu_pod.sh", "create", *POD).stderr
    (stage.checkout / "launch" / "Dockerfile").write_text("")
    (stage.checkout / "neighbour.py").touch()
    for name in range(30):
        (stage.checkout / f"note {name}").touch()
    for command in ("run", "create", "install"):
        said = stage.run("tpu_pod.sh", command, "--dry-run", *POD, *TRAIN).stderr
        assert " M launch/Dockerfile\n?? neighbour.py\n" in said
        assert "and 12 more: git status" in said


def dry(stage, *arguments):
    done = stage.run("tpu_pod.sh", *arguments, "--dry-run", *TRAIN, TMPDIR=str(stage.folder))
    assert done.returncode == 0, done.stderr
    assert not any((stage.folder / f"{name}.calls").exists() for name in ("gcloud", "uv"))
    return done.stdout.splitlines()


PLACE = "--project=p --zone=z"
ALIVE = "--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4"


def test_a_dry_run_prints_the_commands_and_runs_none(stage):
    describe = f"gcloud compute tpus queued-resources describe pod {PLACE} '--format=value(state.state)'"
    ssh = f"gcloud compute tpus tpu-vm ssh pod {PLACE} --worker=all {ALIVE}"
    worker = "bash clipjax/launch/tpu_worker.sh"
    assert dry(stage, "run", *POD, "--spot", "--valid-until-duration", "6h", "--env", "A=it's") == [
        "gcloud storage ls gs://b/run/checkpoints/ --project=p",
        describe,
        f"gcloud compute tpus queued-resources create pod {PLACE} --node-id=pod --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --valid-until-duration=6h --async",
        describe,
        f"git archive --format=tar.gz --output={stage.folder}/clipjax.tar.gz HEAD",
        f"gcloud compute tpus tpu-vm scp {stage.folder}/clipjax.tar.gz pod:clipjax.tar.gz {PLACE} --worker=all",
        f"{ssh} '--command=mkdir -p clipjax && tar -xzf clipjax.tar.gz -C clipjax && {worker} install'",
        f"{ssh} {shlex.quote(f'''--command={worker} start 'A=it'{chr(92)}''s' configs/c.py --train.steps 10 --workdir gs://b/run''')}".replace(
            "'\"'\"'", "'\\''"
        ),
        f"{ssh.replace('=all', '=0')} '--command={worker} follow'",
        f"{ssh} '--command={worker} wait'",
        describe,
        f"gcloud compute tpus queued-resources delete pod {PLACE} --force --quiet",
    ]


@pytest.mark.parametrize(
    ("kind", "software"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_software_follows_from_the_type(stage, kind, software):
    (line,) = dry(stage, "create", *POD, "--type", kind)
    assert parsed(shlex.split(line)[1:])[2]["--runtime-version"] == software
    (line,) = dry(stage, "create", *POD, "--type", kind, "--version", "own")
    assert parsed(shlex.split(line)[1:])[2]["--runtime-version"] == "own"


def test_several_slices_are_one_request_and_are_reached_one_by_one(stage):
    lines = dry(stage, "run", *POD, "--slices", "2")
    (create,) = (line for line in lines if " create " in line)
    assert "--node-count=2 --node-prefix=pod" in create
    assert "--node-id" not in create
    assert [shlex.split(line)[5] for line in lines if " ssh " in line] == ["pod-0", "pod-1"] * 2 + ["pod-0"] + ["pod-0", "pod-1"]
    assert [shlex.split(line)[6] for line in lines if " scp " in line] == ["pod-0:clipjax.tar.gz", "pod-1:clipjax.tar.gz"]


COMMANDS = ("run", "create", "wait", "install", "train", "logs", "status", "stop", "delete")


def test_every_command_fits_the_reference(stage):
    lines = [line for c in COMMANDS for line in dry(stage, c, *POD, "--spot", "--slices", "2")]
    assert len(lines) > 20
    for line in lines:
        if line.startswith("gcloud"):
            parsed(shlex.split(line)[1:])  # fails where the stand-in would


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="the reference itself, where it is installed")
def test_gcloud_itself_accepts_every_command(stage, tmp_path):
    lines = {line for s in ("1", "2") for c in ("run", "status") for line in dry(stage, c, *POD, "--spot", "--slices", s)}
    commands = [{"command_string": line} for line in sorted(lines) if line.startswith("gcloud")]
    # It only reads its own tables for this. A folder of its own, so that nobody's account is looked at.
    (tmp_path / "commands.json").write_text(
        json.dumps([*commands, {"command_string": "gcloud compute tpus tpu-vm ssh --nonsense"}])
    )
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"]
    env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    done = subprocess.run(lint, env=env, capture_output=True, text=True, timeout=100, check=True)
    *found, nonsense = json.loads(done.stdout)
    assert [f for f in found if not f["success"]] == []
    assert len(found) == len(commands)
    assert not nonsense["success"]


def test_from_nothing_to_the_end_of_the_training(stage):
    stage.environment |= TWO
    stage.play("machines.become", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = stage.run(
        "tpu_pod.sh", "run", *POD, "--env", "TFDS_DATA_DIR=gs://b/a b", *TRAIN, "--data.spec", "it's a $HOME", RETRIES="0"
    )
    assert done.returncode == 0, done.stderr
    assert stage.steps() == RUN_STEPS
    assert trained(stage) == [f"pod.{i} train {' '.join(TRAIN)} --data.spec it's a $HOME --workdir gs://b/run" for i in range(2)]
    environment = (stage.folder / "trained.environment").read_text()
    assert "TFDS_DATA_DIR=gs://b/a b\n" in environment
    assert "LIBTPU_INIT_ARGS=--xla_" in environment
    assert "CLIPJAX_RESTARTS=1\n" in environment
    constraints = (stage.folder / "constraints").read_text()
    assert "jax==" in constraints
    assert "libtpu" not in constraints  # else no version would do for both it and jax[tpu]
    (install,) = {" ".join(c) for c in stage.calls("uv") if c[0] == "pip"}
    assert install.endswith(".[tpu,gcs]")
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"pod is {state}\n" in done.stderr
    assert not (stage.folder / "states").exists()


@pytest.mark.slow
def test_keep_leaves_the_machines_and_a_second_run_takes_them(stage):
    assert stage.run("tpu_pod.sh", "run", *POD, "--keep", *TRAIN).returncode == 0
    assert stage.steps() == RUN_STEPS[:-1]
    assert stage.run("tpu_pod.sh", "run", *POD, *TRAIN).returncode == 0
    assert stage.steps() == RUN_STEPS[:-1] + RUN_STEPS[1:]


def test_no_capacity_is_asked_for_again(stage):
    complaints = ['There is no more capacity in the zone "z"', "RESOURCE_EXHAUSTED: Quota limit exceeded"]
    stage.play("create", *complaints, "fine")
    stage.play("machines.become", "WAITING_FOR_RESOURCES FAILED", "ACTIVE")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert all(complaint in done.stderr for complaint in complaints)
    assert stage.steps() == ["create", "create", "create", "delete", *RUN_STEPS]


def test_with_never_any_capacity_it_gives_up_and_leaves_nothing(stage):
    stage.play("machines.become", "FAILED")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN, RETRIES="3")
    assert done.returncode == 75
    assert "tries in a row without progress: 3, giving up" in done.stderr
    assert stage.steps() == ["create", "delete"] * 3
    assert trained(stage) == []


def test_a_request_that_is_refused_is_not_repeated(stage):
    stage.play("create", "PERMISSION_DENIED: The caller does not have permission")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert stage.steps() == ["create"]


def test_without_an_account_it_ends_at_once_and_a_passing_fault_does_not_matter_later(stage):
    stage.play("describe", "UNAUTHENTICATED: no credentials")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 1
    assert "UNAUTHENTICATED" in done.stderr
    assert "create" not in stage.steps()
    (stage.folder / "describe.count").unlink()
    stage.play("describe", "fine", "UNAVAILABLE", "UNAVAILABLE", "fine")
    assert stage.run("tpu_pod.sh", "run", *POD, *TRAIN).returncode == 0
    (stage.folder / "describe.count").unlink()
    stage.play("describe", "UNAVAILABLE")
    assert stage.run("tpu_pod.sh", "wait", *POD).returncode == 1


def test_preempted_in_training_it_resumes_on_new_machines(stage):
    stage.environment |= TWO
    stage.play("train", "taken", "0")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "pod is SUSPENDED: deleting it" in done.stderr
    assert stage.steps()[-8:] == ["delete", *RUN_STEPS]
    assert len(trained(stage)) == 4
    assert len({line.split(" ", 1)[1] for line in trained(stage)}) == 1  # the same command, so the same workdir


def test_only_tries_without_a_newer_checkpoint_count(stage):
    stage.play("train", "save slow taken", "save slow taken", "save slow taken", "0")
    assert stage.run("tpu_pod.sh", "run", *POD, *TRAIN, RETRIES="1").returncode == 0


@pytest.mark.slow
def test_preempted_again_and_again_without_progress_it_gives_up(stage):
    stage.play("train", "taken")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN, RETRIES="2")
    assert done.returncode == 75
    assert stage.steps().count("create") == 2
    assert stage.steps()[-1] == "delete"


def test_an_installation_that_fails_on_one_worker_is_repeated(stage):
    stage.environment |= TWO
    stage.play("install", "fails on pod.1", "fine")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "pod.1: No space left on device" in done.stderr
    assert "the installation failed on a worker" in done.stderr
    assert stage.steps() == ["create", "scp", "install", *RUN_STEPS[1:]]


@pytest.mark.slow
def test_an_installation_that_always_fails_ends_it(stage):
    stage.environment |= TWO
    stage.play("install", "fails on pod.1")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN, RETRIES="2")
    assert done.returncode == 75
    assert stage.steps() == ["create", *["scp", "install"] * 2, "delete"]
    assert stage.run("tpu_pod.sh", "create", *POD).returncode == 0
    assert stage.run("tpu_pod.sh", "install", *POD).returncode == 1
    assert trained(stage) == []


@pytest.mark.parametrize(("act", "status"), [("2@pod.1", 2), ("3@pod.1 75", 3), ("1@pod.0", 1)])
def test_the_status_is_that_of_the_worst_worker(stage, act, status):
    stage.environment |= TWO
    stage.play("train", act)
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN, RETRIES="0")
    assert done.returncode == status, done.stderr
    assert stage.steps() == RUN_STEPS  # neither is mended by other machines


def test_a_worker_starts_its_process_again_by_itself(stage):
    stage.environment |= TWO
    stage.play("train", "75", "0")
    assert stage.run("tpu_pod.sh", "run", *POD, *TRAIN).returncode == 0
    assert stage.steps() == RUN_STEPS
    assert len(trained(stage)) == 4


def test_training_continues_when_the_connection_breaks(stage):
    stage.environment |= TWO
    stage.play("train", "slow slow 0")
    stage.play("ssh.follow", "broken", "fine")
    stage.play("ssh.wait", "broken", "fine")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "lost the connection" in done.stderr
    assert stage.steps() == ["create", "scp", "install", "start", "follow", "wait", "follow", "wait", "delete"]
    assert len(trained(stage)) == 2


@pytest.mark.slow
def test_machines_that_cannot_be_reached_are_replaced(stage):
    stage.play("ssh.follow", *["broken"] * 5, "fine")
    stage.play("ssh.wait", *["broken"] * 5, "fine")
    done = stage.run("tpu_pod.sh", "run", *POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "pod can't be reached: deleting it" in done.stderr
    assert stage.steps().count("create") == 2


def test_several_slices_train_together(stage):
    stage.environment |= TWO
    stage.play("train", "1@pod-1.0", "0")
    done = stage.run("tpu_pod.sh", "run", *POD, "--slices", "2", *TRAIN, RETRIES="2")
    assert done.returncode == 0, done.stderr
    assert len({line.split()[0] for line in trained(stage)}) == 4
    assert len(trained(stage)) == 5


def test_step_by_step_and_stop(stage):
    stage.environment |= TWO
    stage.play("train", "until-signal")
    assert stage.run("tpu_pod.sh", "create", *POD).returncode == 0
    assert stage.run("tpu_pod.sh", "wait", *POD).returncode == 0
    assert stage.run("tpu_pod.sh", "install", *POD).returncode == 0
    assert "not started" in stage.run("tpu_pod.sh", "status", *POD).stdout
    training = stage.start("tpu_pod.sh", "train", *POD, *TRAIN)
    try:
        limit = time.monotonic() + 300
        while len([*stage.folder.glob("ready.*")]) < 2:
            assert training.poll() is None, training.communicate()
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert stage.run("tpu_pod.sh", "status", *POD).stdout.count(": training") == 2
        assert stage.run("tpu_pod.sh", "stop", *POD).returncode == 0
        out, err = training.communicate(timeout=300)
    finally:
        training.kill()
    assert training.returncode == 75, err
    assert "saved" in out
    assert stage.run("tpu_pod.sh", "status", *POD).stdout.count("ended with status 75") == 2
    assert len(trained(stage)) == 2  # not started again


def test_interrupted_it_says_what_continues(stage):
    stage.play("machines.become", "WAITING_FOR_RESOURCES")
    running = stage.start("tpu_pod.sh", "run", *POD, *TRAIN)
    try:
        limit = time.monotonic() + 300
        while "create" not in stage.steps():
            assert time.monotonic() < limit
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        err = running.communicate(timeout=300)[1]
    finally:
        running.kill()
    assert running.returncode == 130
    assert "continues, and costs money" in err
