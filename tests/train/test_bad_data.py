"""Runs whose data are largely bad: they end with status 3 and say why, on one host or several, and lose nothing."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests import hosts
from tests.test_cli import run
from tests.test_distributed import messages

CONFIG = hosts.ROOT / "tests/train/tiny_hosts.py"


def write(folder, names=None):
    """Forty images, or those of the names, and a tsv of forty."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        if names is None or i in names:
            image.save(folder / f"{i}.png")
    rows = "".join(f"{i}.png\tnumber {i}\n" for i in range(40))
    (folder / "pairs.tsv").write_text(f"filepath\ttitle\n{rows}")
    return folder


def train(folder, workdir, *options):
    return run("train", CONFIG, "--workdir", workdir, "--data.spec", f"tsv:{folder}/pairs.tsv", *options)


def test_a_run_with_too_many_missing_files_ends_and_goes_on_once_they_are_there(tmp_path, capsys, caplog):
    data, workdir = write(tmp_path / "data", range(0, 40, 2)), tmp_path / "run"
    assert train(data, workdir) == 3
    *shown, message = capsys.readouterr().err.splitlines()
    assert message.startswith("clipjax: data.max_bad = 0.1: ")
    assert f"; the first is {data}/" in message
    assert f".png of tsv:{data}/pairs.tsv, which can't be read; the last good checkpoint is {workdir}@5. Remedy: check" in message
    lines = hosts.metrics(workdir)
    assert sum(line["replaced"] for line in lines) >= 64 > sum(line["replaced"] for line in lines[:-2])
    assert all(line["bad_share"] == line["replaced"] / 16 for line in lines)
    assert any("  bad 5" in line for line in shown)
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("is replaced by another, because it can't be read: FileNotFoundError" in line for line in warnings) == 5
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == 5  # and not the state that it ended with
    write(data)
    assert train(data, workdir) == 0
    assert "resuming at step" in capsys.readouterr().err
    assert [line["step"] for line in hosts.metrics(workdir)] == list(range(1, 21))


@pytest.mark.parametrize(
    ("batch_size", "saved"),
    [pytest.param("8", ["5"], marks=pytest.mark.slow), ("40", [])],  # 40 examples are too few to tell
)
def test_with_two_of_forty_files_no_run_trains_on_copies(batch_size, saved, tmp_path, capsys):
    data = write(tmp_path / "data", (5, 17))
    assert train(data, tmp_path / "run", "--train.batch_size", batch_size, "--train.log_every", "50") == 3
    assert "bad (can't be read: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == saved


@pytest.mark.slow
def test_bad_files_of_one_host_end_all(tmp_path):
    write(tmp_path / "host0")
    folder = write(tmp_path / "host1", range(0, 40, 3))
    command = ["train", str(CONFIG), "--workdir", f"{tmp_path}/run", "--data.spec", "tsv:pairs.tsv"]
    env = {"APART": f"{tmp_path}/host", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with hosts.started(2, [f"{hosts.ROOT}/tests/train/apart.py", *command], tmp_path / "out", **env) as both:
        assert hosts.ended(both, 300) == [3, 3], hosts.report(both)
    (message,) = [line for host in both for line in messages(host) if "data.max_bad" in line]
    assert "examples are bad (can't be read: " in message
    assert not (folder / message.partition("the first is ")[2].partition(" of tsv:")[0]).exists()
    lines = hosts.metrics(tmp_path / "run")
    assert 0.2 < sum(line["bad_share"] for line in lines) / len(lines) < 0.45  # of both hosts

    shutil.rmtree(tmp_path / "run")
    (folder / "pairs.tsv").write_text((folder / "pairs.tsv").read_text().replace("number 7", "seven"))
    with hosts.started(2, [f"{hosts.ROOT}/tests/train/apart.py", *command], tmp_path / "out", **env) as both:
        assert hosts.ended(both, 300) == [2, 2], hosts.report(both)
    assert "the fingerprint of the data" in both[1].complained
