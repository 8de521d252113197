import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax.evals import retrieval
from clipjax.evals.encoder import Embeddings
from clipjax.sharding import BATCH
from tests.evals.tiny import MESHES, mesh_of


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batches(z, index, mesh, size):
    """As the encoder gives them: padded to full batches, each sharded over the devices. The padding is a copy, the worst case."""
    pad = -len(z) % size
    z = np.concatenate([z, np.repeat(z[:1], pad, 0)]).astype(np.float32)
    index = np.concatenate([index, np.full(pad, -1)]).astype(np.int32)
    place = NamedSharding(mesh, P(None, BATCH))
    return Embeddings(*(jax.device_put(x.reshape(-1, size, *x.shape[1:]), place) for x in (z, index)))


def dense(images, texts, owner):
    """All recalls from the full matrix, in float64."""
    s = images.astype(np.float64) @ texts.astype(np.float64).T
    own = np.arange(len(images))[:, None] == owner[None, :]

    def ranks(s, own):
        best = np.where(own, s, -np.inf).max(1, keepdims=True)
        return 1 + ((s > best + 1e-6) & ~own).sum(1) + 0.5 * ((np.abs(s - best) <= 1e-6) & ~own).sum(1)

    found = {}
    for k in (1, 5, 10):
        found[f"image_retrieval_recall@{k}"] = np.mean(ranks(s.T, own.T) <= k)
        found[f"text_retrieval_recall@{k}"] = np.mean(ranks(s, own) <= k)
    return found


def pairs(seed, counts, e=16, noise=1.0):
    rng = np.random.default_rng(seed)
    images = unit(rng.standard_normal((len(counts), e)))
    owner = np.repeat(np.arange(len(counts)), counts)
    return images, unit(images[owner] + noise * unit(rng.standard_normal((len(owner), e)))), owner


def measure(images, texts, owner, mesh, size=16, chunk=8):
    to_device = batches(images, np.arange(len(images)), mesh, size), batches(texts, owner, mesh, size)
    return retrieval.recalls(*to_device, mesh, chunk)


@pytest.mark.parametrize("counts", ["one", "five", "ragged"])
def test_equals_the_dense_reference_on_every_mesh(counts):
    rng = np.random.default_rng(1)
    number = {"one": np.ones(53, int), "five": np.full(53, 5), "ragged": rng.integers(1, 7, 53)}[counts]
    images, texts, owner = pairs(2, number, noise=1.5)
    texts[owner == 7] = texts[owner == 7][:1]  # equal captions of one image
    texts[3] = texts[-1]  # the same caption for two images
    images[11] = images[12]
    want = dense(images, texts, owner)
    assert 0 < want["image_retrieval_recall@1"] < want["image_retrieval_recall@10"] < 1
    for name in MESHES:
        assert measure(images, texts, owner, mesh_of(name)) == pytest.approx(want, abs=1e-12)


def test_which_is_which():
    """The caption of image 0 is nearest to it; those of the other images are nearest to it too, but farther."""
    images = np.eye(3)
    texts = unit(np.array([[1, 0, 0], [1, 0.2, 0], [1, 0.1, 0.3]]))
    found = measure(images, texts, np.arange(3), mesh_of("1"))
    assert found["image_retrieval_recall@1"] == pytest.approx(1 / 3)  # text -> image: only caption 0 finds its own
    assert found["text_retrieval_recall@1"] == pytest.approx(1)  # image -> text: each has its caption nearest


def test_any_caption_counts_and_the_others_change_nothing():
    images = np.eye(16)[:12]
    texts = np.repeat(images, 5, 0)
    texts[::5] = np.eye(16)[15]  # one of five is hopeless
    found = measure(images, texts, np.repeat(np.arange(12), 5), mesh_of("8"))
    assert found["text_retrieval_recall@1"] == 1
    assert found["image_retrieval_recall@1"] == pytest.approx(0.8)


@pytest.mark.parametrize("name", MESHES)
def test_a_collapsed_model_scores_nothing(name):
    same = np.repeat(unit(np.random.default_rng(0).standard_normal((1, 64))), 100, 0)
    found = measure(same, same, np.arange(100), mesh_of(name))
    assert set(found.values()) == {0.0}


def test_reversed_and_random_rankings():
    n = 40
    eye = np.eye(64)[:n]
    assert measure(eye, -eye, np.arange(n), mesh_of("8"))["text_retrieval_recall@10"] == 0
    rng = np.random.default_rng(3)
    found = measure(
        unit(rng.standard_normal((2000, 8))), unit(rng.standard_normal((2000, 8))), np.arange(2000), mesh_of("1"), 2000
    )
    assert abs(found["image_retrieval_recall@10"] - 10 / 2000) < 4 * (10 / 2000 / 2000) ** 0.5


def ranks(queries, query_ids, keys, key_ids, chunk=2):
    args = [np.float32(queries), np.int32(query_ids), np.float32(keys), np.int32(key_ids)]

    def local(*args):
        return retrieval.ranks(*args, BATCH, chunk)

    mapped = jax.shard_map(local, mesh=mesh_of("8"), in_specs=(P(BATCH),) * 4, out_specs=P(BATCH))
    return np.asarray(jax.jit(mapped)(*map(jnp.asarray, args)))


def test_ranks_themselves():
    images, texts, owner = pairs(5, np.ones(24, int), noise=3)
    cosines = images @ texts.T
    want = 1 + (cosines > np.diagonal(cosines)[:, None]).sum(1)
    np.testing.assert_array_equal(ranks(images, np.arange(24), texts, owner), want)
    assert want.max() > 10


def test_rounding_is_a_tie_and_a_difference_is_not():
    queries = np.ones((8, 1))
    keys = np.array([0.5, 0.5 + 2e-7, 0.5 - 2e-7, 0.5 + 1e-5, 0.5 - 1e-5, 0.5, 0.9, -0.9])[:, None]
    others = [0, 1, 1, 1, 1, 1, 1, -1]
    assert ranks(queries, [0, 1, 2, -1, 0, 0, 0, 0], keys, others)[:4].tolist() == [1 + 2 + 3 / 2, 1, np.inf, np.inf]


def test_no_device_holds_the_matrix():
    """Compiled for 8 devices: memory grows with the rows, far below the share of the full matrix."""
    mesh = mesh_of("8")
    rows = NamedSharding(mesh, P(None, BATCH))

    def temporary(n, e=32):
        z = jax.ShapeDtypeStruct((n // 256, 256, e), jnp.float32, sharding=rows)
        index = jax.ShapeDtypeStruct((n // 256, 256), jnp.int32, sharding=rows)
        one = Embeddings(z, index)
        return retrieval._hits.lower(one, one, mesh, 256).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(8192), temporary(32768)
    assert large < 4.2 * small
    assert large < 0.1 * (4 * 32768**2 / 8)
