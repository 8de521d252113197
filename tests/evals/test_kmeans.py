"""Lloyd's k-means on unit vectors, over eight simulated devices, beside dense float64 numpy."""

import numpy as np
import pytest

from clipjax import cli
from clipjax.config import Data
from clipjax.data.sources import open_source
from clipjax.data.vectors import LABELS, Vectors
from clipjax.evals import kmeans
from tests.data.conftest import write_tsv


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def planted(clusters, each, width=6, noise=0.1, seed=0):
    """Rows around far directions, shuffled, and the cluster of each."""
    rng = np.random.default_rng(seed)
    number = rng.permutation(np.repeat(np.arange(clusters), each))
    centres = unit(rng.normal(size=(4000, width)))
    chosen = [0]
    for _ in range(clusters - 1):
        chosen.append(int((centres @ centres[chosen].T).max(1).argmin()))
    return np.float32(unit(centres[chosen][number] + noise * rng.normal(size=(len(number), width)))), number


@pytest.fixture
def small(monkeypatch):
    """Several chunks, with a rest."""
    monkeypatch.setattr(kmeans, "COMPARED", 20)


@pytest.mark.usefixtures("small")
def test_planted_clusters_are_found_and_the_labels_are_the_nearest():
    rows, number = planted(7, 9)
    found = kmeans.kmeans((rows,), 7, nearest=3)
    assert len({*zip(found.label[:, 0].tolist(), number.tolist(), strict=True)}) == 7
    means = unit(np.stack([rows[found.label[:, 0] == c].sum(0, dtype=np.float64) for c in range(7)]))
    np.testing.assert_allclose(found.centroid, means, atol=1e-6)
    cosines = rows.astype(np.float64) @ means.T
    assert (found.label == np.argsort(-cosines, 1)[:, :3]).all()
    assert found.label.dtype == np.int32
    assert abs(found.cosine - cosines.max(1).mean()) < 1e-6


@pytest.mark.usefixtures("small")
def test_a_round_is_lloyds_and_an_empty_cluster_gets_the_farthest_row(monkeypatch):
    rows = np.float32(unit(np.random.default_rng(3).normal(size=(29, 5))))
    start = np.concatenate([rows[:5], -rows[:1] * 0])  # nobody's: cosine 0 with all
    start[5] = -unit(start[:5].sum(0))
    cosines = rows @ start.T
    monkeypatch.setattr(kmeans, "_start", lambda *_: start)
    monkeypatch.setattr(kmeans, "ROUNDS", 1)
    number = cosines.argmax(1)
    want = np.stack([unit(rows[number == c].sum(0)) if (number == c).any() else np.zeros(5) for c in range(6)])
    empty = [c for c in range(6) if not (number == c).any()]
    far = np.sort(np.argsort(cosines.max(1))[: len(empty)])
    want[empty] = rows[far]
    np.testing.assert_allclose(kmeans.kmeans((rows,), 6).centroid, want, atol=1e-6)


@pytest.mark.usefixtures("small")
def test_fewer_different_rows_than_clusters():
    rows, _ = planted(3, 5, noise=0)
    found = kmeans.kmeans((rows,), 5)
    assert len(np.unique(found.label)) == 3
    assert abs(found.cosine - 1) < 1e-6


def test_both_sides_count_alike():
    """The images tell two clusters, the texts two others; both together four."""
    (image, a), (text, b) = planted(2, 20), planted(2, 20, seed=1)
    rows = 5 * image, text
    z = kmeans._rows(rows, slice(None))
    np.testing.assert_allclose(z @ z.T, (image @ image.T + text @ text.T) / 2, atol=1e-6)
    found = kmeans.kmeans(rows, 4)
    assert len({*zip(found.label[:, 0].tolist(), a.tolist(), b.tolist(), strict=True)}) == 4


@pytest.fixture
def embedded(tmp_path):
    rows, _ = planted(5, 4)
    np.savez(tmp_path / "emb.npz", image=rows, text=-rows, key=[f"{i}.png" for i in range(20)])
    return tmp_path / "emb.npz"


def test_what_the_command_writes_are_labels(embedded, tmp_path, capsys):
    more = ["--classes", "5", "--nearest", "2", "--seed", "4"]
    for out in ("a.npz", "b.npz"):
        assert not cli.main(["cluster", str(embedded), *more, "--out", str(tmp_path / out)])
    assert "a.npz: 20 rows in 5 of 5 clusters after" in capsys.readouterr().out
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert sorted(first) == ["centroid", "key", "label"]
        assert all((first[name] == second[name]).all() for name in first)
        label = first["label"]
        assert (label.dtype, label.shape) == (np.int32, (20, 2))
    tsv = write_tsv(tmp_path, [(f"{i}.png", "a") for i in range(20)])
    labels = Vectors(str(tmp_path / "a.npz"), open_source(Data(spec=f"tsv:{tsv}")), use=LABELS)
    assert (labels[7]["label"] == label[7]).all()
    assert labels.highest == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "21"], "--classes = 21: must be at most the 20 rows of"),
        (["--classes", "3", "--nearest", "4"], "--nearest = 4: must be at most --classes, 3"),
        (["--classes", "3", "--seed", "-1"], "--seed = -1: must not be negative"),
        (["--classes", "3", "--side", "text"], "must hold arrays text and key; write it with `clipjax embed RUN"),
        (["--classes", "3"], "has vectors that are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(embedded, tmp_path, capsys, options, message):
    with np.load(embedded) as arrays:
        broken = np.where(arrays["image"] > 0, np.nan, 0) if message.startswith("has") else arrays["image"]
        np.savez(tmp_path / "images.npz", image=broken, key=arrays["key"])
    assert cli.main(["cluster", str(tmp_path / "images.npz"), *options, "--out", str(tmp_path / "out.npz")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()
