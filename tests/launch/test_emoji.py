"""launch/emoji.sh with stand-ins for what launch/setup.sh installs."""

import shutil
import subprocess

import pytest

from tests.launch.stand_ins import ROOT


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose programs note their arguments and PYTHONPATH."""
    programs = {"launch/setup.sh": "", ".venv/bin/clipjax": 'echo "${PYTHONPATH:-none} $*" >>calls', ".venv/bin/python": "exit 0"}
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    shutil.copy(ROOT / "launch" / "emoji.sh", tmp_path / "launch")
    return tmp_path


def emoji(checkout, *arguments):
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", checkout / "launch" / "emoji.sh", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line.split(" ", 1) for line in (checkout / "calls").read_text().splitlines()]


def test_it_trains_evaluates_and_exports_in_the_environment_as_it_is(checkout):
    said, calls = emoji(checkout, "runs/x", "--train.steps", "2")
    assert {path for path, _ in calls} == {"none"}
    assert [words.split(" runs/x")[0] for _, words in calls] == [
        "train emoji_clip --workdir",
        "eval retrieval",
        "eval zeroshot",
        "export",
        "export",
    ]
    assert calls[0][1].endswith("--workdir runs/x --train.steps 2")
    assert "pip install tensorboard && tensorboard --logdir runs/x" in said


def test_where_torchvision_does_not_load_the_exports_are_checked_without_it(checkout):
    (checkout / ".venv" / "bin" / "python").write_text("#!/usr/bin/env bash\nexit 1\n")
    (checkout / ".venv" / "bin" / "tensorboard").write_text("")
    (checkout / ".venv" / "bin" / "tensorboard").chmod(0o755)
    said, calls = emoji(checkout)
    assert [path for path, _ in calls] == ["none"] * 3 + [str(checkout / "tests" / "shim")] * 2
    assert "its log: tensorboard --logdir runs/emoji\n" in said
