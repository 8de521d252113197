"""The wheel as a user has it: installed in an empty environment, outside the repository; what a release and the tree hold."""

import json
import os
import re
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from clipjax import __version__, config

ROOT = Path(__file__).parents[1]
# The user's settings only: not the folders that these tests import from.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
TINY = {  # emoji_clip on six images, in seconds
    "data.spec": "tsv:pairs.tsv", "data.workers": 1, "evals.0.data": "tsv:pairs.tsv", "evals.0.every": 2, "train.steps": 2,
    "train.batch_size": 4, "train.checkpoint_every": 2, "train.log_every": 1, "optim.schedule.warmup": 1,
    "model.image.image_size": 16, "model.image.patch_size": 8, "model.text.length": 8, "model.text.vocab_size": 300,
    "model.unroll": 1,
} | {f"model.{tower}.{field}": n for tower in ("image", "text") for field, n in (("width", 8), ("depth", 1), ("heads", 1),
    ("mlp_dim", 8), ("embed_dim", 8))}  # fmt: skip


def run(*args: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="what builds the wheel: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def clipjax(wheel, tmp_path_factory) -> Path:
    """The program, in an environment that has the wheel, and for all else the packages of this one."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python reads no .pth file of a folder that a .pth file names: the editable install of this repository is not found.
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    assert run(python, "-c", "import clipjax; print(clipjax.__file__)", cwd=folder).strip() == f"{packages}/clipjax/__init__.py"
    return folder / "bin" / "clipjax"


def test_the_wheel_holds_the_package_its_types_and_its_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tree = [path for path in (ROOT / "clipjax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sources = {f"clipjax/{path.relative_to(ROOT / 'clipjax')}" for path in tree}  # and their data, as the page of a report
    configs = {f"clipjax/_configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    files = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert files == sources | configs
    assert {"clipjax/py.typed", "clipjax/report/template.html"} <= sources
    about = f"clipjax-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        assert opened.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = opened.read(f"{about}/METADATA").decode().partition("\n\n")[0].splitlines()
    assert {f"Version: {__version__}", "License-Expression: Apache-2.0", "Author: The clipjax developers"} <= set(metadata)


@pytest.mark.slow
def test_a_user_trains_on_a_tsv_of_their_own(clipjax, tmp_path):
    listed = run(clipjax, "configs", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    (tmp_path / "my.py").write_text(run(clipjax, "configs", "emoji_clip", cwd=tmp_path))

    rows = ["filepath\ttitle"]
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\tred number {i}")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    options = [word for field, value in TINY.items() for word in (f"--{field}", value)]
    run(clipjax, "train", "my.py", "--workdir", "run", *options, cwd=tmp_path)

    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json"}
    trained = config.from_json((tmp_path / "run" / "config.json").read_text())
    assert (trained.data.spec, trained.train.steps, trained.model.image.width) == ("tsv:pairs.tsv", 2, 8)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "task" in line] == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_a_release_has_one_version_and_a_date():
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert newest
    assert newest[1] in (f"{__version__} ({citation['date-released'].strip(chr(34))})", "Unreleased")
    assert citation["version"] == __version__


def test_no_tracked_file_is_large():
    """A repository keeps every version of a file for good: data, weights and wheels belong elsewhere."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    files = [path for path in (ROOT / name for name in tracked if name) if path.is_file()]
    assert [str(path) for path in files if path.stat().st_size > 1_000_000] == []
