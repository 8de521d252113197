import dataclasses

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.evals import transfer
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.labels import Labelled
from clipjax.evals.transfer import TransferEvaluation, noisy
from tests.evals.tiny import MODEL, mesh_of


def test_noise_has_its_length_and_the_vectors_stay_unit():
    x = np.float32(np.eye(256)[:40])
    np.testing.assert_array_equal(noisy(x, 0.0, 2), np.concatenate([x, x]))
    z = noisy(x, 1.0, 3)
    assert z.shape == (120, 256)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    cosines = (z * np.tile(x, (3, 1))).sum(1)
    assert cosines.mean() == pytest.approx(2**-0.5, abs=0.02)  # of x and x + a vector of length 1 at a right angle
    assert not (z[:40] == z[40:80]).all()


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Stands for the images of a split."""

    z: np.ndarray
    examples: Labelled
    encoder: None = None
    batches: CachedBatches = CachedBatches(list, 0, "images", "images")

    def embed(self, params):
        found = self.examples.labels >= 0
        return self.z[found], self.examples.labels[found], found


def vectors(labels, small, rng):
    """The class is in the first number, with noise, and in the second, which is small and exact; `small` is its sign."""
    side = np.where(labels == 1, 1.0, -1.0)
    z = np.stack([side + 0.7 * rng.normal(size=len(side)), small * 0.3 * side, *rng.normal(size=(6, len(side)))], axis=1)
    keys = tuple(map(str, range(len(labels))))
    return Vectors(np.float32(z / np.linalg.norm(z, axis=1, keepdims=True)), Labelled(keys, ("a",) * len(keys), labels))


def test_noise_hides_a_difference_that_images_do_not_share(monkeypatch):
    """Captions tell their class by a small number exactly, in images its sign is the opposite."""
    rng = np.random.default_rng(0)
    labels = np.int32(rng.integers(0, 2, 400))
    text, train, test = vectors(labels, 1, rng), vectors(labels, -1, rng), vectors(labels[:100], -1, rng)
    monkeypatch.setattr(transfer, "by_index", lambda *_: (text.z, np.ones(400, bool)))
    results = TransferEvaluation(text.batches, train, test, 2, noise=1.0).run({})
    metrics = results.metrics
    assert metrics["acc1_without_noise"] < 0.5 < metrics["acc1"] < metrics["acc1_from_images"] == 1
    assert metrics["acc1_by_noise"][metrics["noises"].index(1.0)] == metrics["acc1"]
    (examples,) = results.examples
    assert {name: values.mean() for name, values in examples.values.items()} == {
        name: metrics[name] for name in ("acc1", "acc1_without_noise", "acc1_from_images")
    }
    assert len(examples.keys) == 100


def test_negative_noise_is_refused():
    with pytest.raises(ConfigError, match=r"^evals\.Transfer\.noise = -1\.0: must not be negative"):
        config.Transfer(noise=-1.0)


def test_transfer_needs_two_splits(tsv):
    data = config.Data(spec=f"tsv:{tsv / 'pairs.tsv'}", split="test")
    encoder = Encoder(MODEL, mesh_of("1"), 4)
    with pytest.raises(ConfigError, match="classifiers would be tested on what they learn from: name two splits, or shares"):
        TransferEvaluation.prepare(encoder, None, data, config.Transfer())
