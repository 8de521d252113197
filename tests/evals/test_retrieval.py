import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.pipeline import Captions
from clipjax.evals import ranks, retrieval
from clipjax.evals.encoder import Embeddings, Encoder
from clipjax.sharding import BATCH
from tests.evals.tiny import MESHES, MODEL, TOKENIZER, mesh_of, standing


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
    """All metrics from the full matrix, in float64."""
    s = images.astype(np.float64) @ texts.astype(np.float64).T
    own = np.arange(len(images))[:, None] == owner[None, :]
    to_image, to_text = standing(s.T, own.T), standing(s, own)
    found = {}
    for what, found_by in (("image", to_image), ("text", to_text)):
        found |= {f"{what}_retrieval_recall@{k}": found_by.hits(k).mean() for k in (1, 5, 10)}
        found |= {f"{what}_retrieval_mean_rank": found_by.rank().mean()}
        found |= {f"{what}_retrieval_median_rank": np.median(found_by.rank())}
    return found | {"pair_auc": np.mean(s[own][:, None] > s[~own][None]) + np.mean(s[own][:, None] == s[~own][None]) / 2}


def pairs(seed, counts, e=16, noise=1.0):
    rng = np.random.default_rng(seed)
    images = unit(rng.standard_normal((len(counts), e)))
    owner = np.repeat(np.arange(len(counts)), counts)
    return images, unit(images[owner] + noise * unit(rng.standard_normal((len(owner), e)))), owner


def retrieve(images, texts, owner, mesh, size=16, chunk=8, languages=(), words=None):
    to_device = batches(images, np.arange(len(images)), mesh, size), batches(texts, np.arange(len(texts)), mesh, size)
    captions = Captions(words or [f"caption {i}" for i in range(len(texts))], owner, [f"{i}.png" for i in range(len(images))])
    return retrieval.retrieve(*to_device, captions, mesh, languages, chunk)


def measure(*args, **kwargs):
    return retrieve(*args, **kwargs).metrics


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
    auc = want.pop("pair_auc")
    for name in MESHES:
        found = measure(images, texts, owner, mesh_of(name))
        assert found.pop("pair_auc") == pytest.approx(auc, abs=1e-3)  # of 4096 bins
        assert (found.pop("mean_rank_variance", None) is not None) == (counts == "five")
        assert found == pytest.approx(want, abs=1e-12)


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
    assert found["image_retrieval_recall@1"] == pytest.approx(0.8 + 0.2 / 12)  # it is equally far from every image


@pytest.mark.parametrize("name", MESHES)
def test_a_collapsed_model_scores_chance(name):
    same = np.repeat(unit(np.random.default_rng(0).standard_normal((1, 64))), 100, 0)
    found = measure(same, same, np.arange(100), mesh_of(name))
    for what in ("image", "text"):
        assert [found[f"{what}_retrieval_recall@{k}"] for k in (1, 5, 10)] == pytest.approx([0.01, 0.05, 0.1], abs=1e-12)
        assert found[f"{what}_retrieval_mean_rank"] == found[f"{what}_retrieval_median_rank"] == 50.5
    assert found["pair_auc"] == 0.5


def test_several_own_captions_in_a_tie_are_several_chances():
    """Twelve images, five equal captions each, a collapsed model: the best of five random places among sixty."""
    same = np.repeat(np.eye(16)[:1], 60, 0)
    found = measure(same[:12], same, np.repeat(np.arange(12), 5), mesh_of("8"))
    assert found["text_retrieval_recall@1"] == pytest.approx(5 / 60)
    assert found["text_retrieval_recall@5"] == pytest.approx(1 - math.comb(55, 5) / math.comb(60, 5))
    assert found["image_retrieval_recall@1"] == pytest.approx(1 / 12)


def test_what_each_query_gave():
    images, texts, owner = pairs(2, np.array([2, 1, 3, 29, 25, *[0] * 7]), noise=1.5)  # seven images without a caption
    results = retrieve(images, texts, owner, mesh_of("8"))
    captions, pictures = results.examples
    assert captions.keys[:4] == ["0.png#0", "0.png#1", "1.png#0", "2.png#0"]
    assert captions.groups[:4] == ["0.png", "0.png", "1.png", "2.png"]
    assert pictures.keys == [f"{i}.png" for i in range(12)]
    assert pictures.groups is None
    for examples in (captions, pictures):
        for name, values in examples.values.items():
            assert len(values) == len(examples.keys)
            assert results.metrics[name] == np.nanmean(values)
    for values in pictures.values.values():
        assert np.isnan(values).tolist() == [False] * 5 + [True] * 7


def test_languages_have_recalls_of_their_own():
    images, texts, owner = pairs(4, np.full(12, 5), noise=2)
    texts[2::5] = images  # the third language is perfect, and wins among all captions
    languages = ("en", "es", "zh", "pt", "it")
    found = measure(images, texts, owner, mesh_of("8"), languages=languages)
    for place, language in enumerate(languages):
        want = dense(images, texts[place::5], np.arange(12))
        of = {name.removesuffix(f"_{language}"): value for name, value in found.items() if name.endswith(f"_{language}")}
        assert of == pytest.approx({name: value for name, value in want.items() if "recall" in name})
    assert found["text_retrieval_recall@1"] == found["text_retrieval_recall@1_zh"] == 1 > found["text_retrieval_recall@1_es"]


def test_mean_rank_variance():
    def of(rank, words):
        captions = Captions(words, np.repeat(np.arange(2), 2), ["a", "b"])
        return retrieval.mean_rank_variance(np.array(rank, float), captions)

    words = ["dog", "Hund", "cat", "Katze"]
    assert of([4, 4, 9, 9], words) == 0
    assert of([1, 3, 1, 3], words) == 1
    assert of([1, 3, 5, 5], words) == 0.5
    assert of([1, 3, np.nan, np.nan], words) == 1  # an image that can't be read
    three = Captions([f"name {i}" for i in range(12)], np.repeat(np.arange(4), 3), list("abcd"))
    ranks = np.array([1, 1, 1, 1, 3, 2, 1, 1, 1, 2, 1, 2.0])
    assert retrieval.mean_rank_variance(ranks, three) == pytest.approx(2 / 9)  # (0 + 2/3 + 0 + 2/9) / 4
    assert of([1, 3, 5, 5], ["dog", "Hund", "taxi", "taxi"]) == 1  # a name that the language lacks
    assert of([1, 1, 5, 5], ["taxi"] * 4) is None


def test_languages_must_be_those_of_the_captions(tsv, caplog):
    data, encoder = config.Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1), Encoder(MODEL, mesh_of("1"), 4)
    with pytest.raises(ConfigError, match=r"^languages = \('en', 'ja'\): not every image of tsv:.* has 2 captions: name the"):
        retrieval.RetrievalEvaluation.prepare(encoder, TOKENIZER, data, config.Retrieval(languages=("en", "ja")))
    with pytest.raises(ConfigError, match="must name each once"):
        config.Retrieval(languages=("en", "en"))
    assert retrieval.RetrievalEvaluation.prepare(encoder, TOKENIZER, data, config.Retrieval()).captions.per_example() == 0
    assert "2 of 11 captions are another image's, too" in caplog.text


def test_reversed_and_random_rankings():
    n = 40
    eye = np.eye(64)[:n]
    assert measure(eye, -eye, np.arange(n), mesh_of("8"))["text_retrieval_recall@10"] == 0
    rng = np.random.default_rng(3)
    found = measure(
        unit(rng.standard_normal((2000, 8))), unit(rng.standard_normal((2000, 8))), np.arange(2000), mesh_of("1"), 2000
    )
    assert abs(found["image_retrieval_recall@10"] - 10 / 2000) < 4 * (10 / 2000 / 2000) ** 0.5


def counts(queries, query_ids, keys, key_ids, chunk=2):
    args = [np.float32(queries), np.int32(query_ids), np.float32(keys), np.int32(key_ids)]

    def local(*args):
        return ranks.counts(*args, BATCH, chunk)

    mapped = jax.shard_map(local, mesh=mesh_of("8"), in_specs=(P(BATCH),) * 4, out_specs=P(BATCH))
    return [np.asarray(x).tolist() for x in jax.jit(mapped)(*map(jnp.asarray, args))]


def test_counts_themselves():
    images, texts, owner = pairs(5, np.ones(24, int), noise=3)
    cosines = images @ texts.T
    want = (cosines > np.diagonal(cosines)[:, None]).sum(1).tolist()
    assert counts(images, np.arange(24), texts, owner) == [want, [0] * 24, [1] * 24]
    assert max(want) >= 10


def test_rounding_is_a_tie_and_a_difference_is_not():
    queries = np.ones((8, 1))
    keys = np.array([0.5, 0.5 + 2e-7, 0.5 - 2e-7, 0.5 + 1e-5, 0.5 - 1e-5, 0.5, 0.9, -0.9])[:, None]
    greater, equal, own = counts(queries, [0, 1, 2, -1, 0, 0, 0, 0], keys, [0, 1, 1, 1, 1, 1, 1, -1])
    assert (greater[:2], equal[:2]) == ([2, 0], [3, 0])
    assert own[:4] == [1, 1, 0, 0]  # of the third there are no keys, and the fourth is padding


def test_no_device_holds_the_matrix():
    """Compiled for 8 devices: memory grows with the rows, far below the share of the full matrix."""
    mesh = mesh_of("8")
    rows = NamedSharding(mesh, P(None, BATCH))

    def temporary(n, e=32):
        z = jax.ShapeDtypeStruct((n // 256, 256, e), jnp.float32, sharding=rows)
        index = jax.ShapeDtypeStruct((n // 256, 256), jnp.int32, sharding=rows)
        one, ids = Embeddings(z, index), jax.ShapeDtypeStruct((n,), jnp.int32)
        parts = (ranks._ranks, ranks._histograms)
        return max(f.lower(one, ids, one, ids, mesh, 256).compile().memory_analysis().temp_size_in_bytes for f in parts)

    small, large = temporary(8192), temporary(32768)
    assert large < 4.2 * small
    assert large < 0.1 * (4 * 32768**2 / 8)
