import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.evals import zeroshot
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.inputs import prompt_batches
from clipjax.evals.prompts import fill, templates
from clipjax.evals.zeroshot import ZeroshotEvaluation
from clipjax.sharding import over_rows, replicated
from tests.evals.tiny import MODEL, TOKENIZER, WORDS, image_batches, mesh_of, tokenize


def dense_weights(model, names, prompts):
    """unit(mean over templates of unit(text)), one class at a time, in float64."""
    rows = []
    for name in names:
        z = np.float64(model.encode_text(tokenize([fill(t, name) for t in prompts])))
        mean = (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def dense_metrics(images, weights, labels):
    s = np.float64(images) @ weights.T
    right = s[np.arange(len(s)), labels][:, None]
    other = np.arange(len(weights))[None, :] != labels[:, None]
    rank = 1 + ((s > right + 1e-6) & other).sum(1) + 0.5 * ((np.abs(s - right) <= 1e-6) & other).sum(1)
    top5 = np.mean(rank <= 5) if len(weights) >= 5 else None
    recall = np.mean([np.mean(rank[labels == c] <= 1) for c in np.unique(labels)])
    return {"acc1": np.mean(rank <= 1), "acc5": top5, "mean_per_class_recall": recall}


@pytest.mark.parametrize("prompts", ["plain", "simple"])
def test_class_embeddings_are_ensembled(encoder, model, params, prompts):
    prompts = templates(prompts)
    texts = prompt_batches(encoder, TOKENIZER, WORDS, prompts)
    evaluation = ZeroshotEvaluation(encoder, CachedBatches(list, 0, "", ""), texts, len(WORDS))
    got = evaluation.class_embeddings(params)
    assert got.sharding.is_fully_replicated
    np.testing.assert_allclose(got, dense_weights(model, WORDS, prompts), atol=1e-6)


@pytest.mark.parametrize("names", [WORDS, WORDS[:3]])
def test_equals_the_dense_reference(encoder, model, params, images, names):
    prompts = templates("simple")
    z = np.asarray(model.encode_image(jnp.asarray(images)))
    weights = dense_weights(model, names, prompts)
    labels = np.argsort(-(z @ weights.T), axis=1)[np.arange(37), np.arange(37) % min(8, len(names))].astype(np.int32)
    want = dense_metrics(z, weights, labels)
    assert 0 < want["acc1"] < 1
    assert want["mean_per_class_recall"] != pytest.approx(want["acc1"])
    images = image_batches(images, encoder, label=labels)
    texts = prompt_batches(encoder, TOKENIZER, names, prompts)
    found = ZeroshotEvaluation(encoder, images, texts, len(names)).run(params).metrics
    assert found == pytest.approx(want, abs=1e-12)
    assert (found["acc5"] is None) == (len(names) < 5)


def count(cosines, labels):
    """The counting alone, on chosen cosines: image i is the i-th unit vector, so that `weights` are the cosines."""
    cosines = np.asarray(cosines, np.float32)
    empty = jnp.zeros((cosines.shape[1], 3), jnp.int32)
    rows = jnp.eye(len(cosines))
    return np.asarray(jax.jit(zeroshot._count)(empty, jnp.asarray(cosines.T), rows, jnp.asarray(labels, jnp.int32)))


def test_counts_by_class():
    found = count([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0]], [0, 1, 1])
    np.testing.assert_array_equal(found, [[1, 1, 1], [1, 2, 2], [0, 0, 0]])  # class 2 does not occur


def test_padding_is_not_counted():
    assert count([[0.9, 0.1], [0.9, 0.1]], [-1, 0]).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_ties_are_no_hits():
    six = [[0.5] * 6]
    assert count(six, [3])[3].tolist() == [0, 1, 1]  # rank 1 + 5/2
    assert count([[0.5] * 11], [3])[3].tolist() == [0, 0, 1]  # rank 1 + 10/2
    assert count([[0.5, 0.5 + 1e-7, 0]], [0])[0].tolist() == [0, 1, 1]  # rounding is no difference
    assert count([[0.5, 0.5 + 1e-5, 0]], [1])[1].tolist() == [1, 1, 1]


def test_recall_weighs_classes_and_accuracy_images(params):
    """Nine of A, one of B, all are taken for A."""
    encoder = Encoder(MODEL, mesh_of("1"), 10)
    images = image_batches(np.zeros((10, 8, 8, 3), np.uint8), encoder, label=np.array([0] * 9 + [1], np.int32))
    evaluation = ZeroshotEvaluation(encoder, images, CachedBatches(list, 0, "", ""), 2)
    z = next(encoder.stream(params, images))[0][0]
    evaluation.class_embeddings = lambda _: jnp.stack([z, -z])
    assert evaluation.run(params).metrics == {"acc1": 0.9, "acc5": None, "mean_per_class_recall": 0.5}


def test_order_of_the_classes_does_not_matter(params, images):
    encoder = Encoder(MODEL, mesh_of("8"), 16)
    labels = np.arange(37, dtype=np.int32) % 11
    order = np.random.default_rng(0).permutation(11)
    runs = []
    for names, label in ((WORDS, labels), ([WORDS[i] for i in order], np.argsort(order)[labels].astype(np.int32))):
        prompts = prompt_batches(encoder, TOKENIZER, names, templates("simple"))
        runs.append(ZeroshotEvaluation(encoder, image_batches(images, encoder, label=label), prompts, 11).run(params).metrics)
    assert runs[0] == pytest.approx(runs[1], abs=1e-12)


def test_a_device_holds_only_its_images_cosines():
    mesh = mesh_of("8")
    encoder = Encoder(MODEL, mesh, 1024)
    evaluation = ZeroshotEvaluation(encoder, CachedBatches(list, 0, "", ""), CachedBatches(list, 0, "", ""), 4096)

    def shape(*shape, dtype=jnp.float32, rows=False):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=(over_rows if rows else replicated)(mesh))

    args = shape(4096, 3, dtype=jnp.int32), shape(4096, 8), shape(1024, 8, rows=True), shape(1024, dtype=jnp.int32, rows=True)
    used = evaluation._count.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < (4 * 1024 * 4096) / 3  # twice its eighth of the batch's cosines, and the counts
