import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.evals import zeroshot
from clipjax.evals.classes import Classes
from clipjax.evals.classification import precision_per_class
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.inputs import prompt_batches
from clipjax.evals.predictions import Predictions
from clipjax.evals.prompts import fill, templates
from clipjax.evals.zeroshot import ZeroshotEvaluation
from clipjax.sharding import over_rows, replicated
from tests.evals.tiny import MODEL, TOKENIZER, WORDS, image_batches, mesh_of, tokenize

NONE = CachedBatches(list, 0, "", "")


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
    greater, tied = (s > right + 1e-6).sum(1), (np.abs(s - right) <= 1e-6).sum(1)  # with the right class itself
    top1, top5 = (np.clip((k - greater) / tied, 0, 1) for k in (1, 5))
    recall = np.mean([np.mean(top1[labels == c]) for c in np.unique(labels)])
    taken, right = np.bincount(s.argmax(1), minlength=len(weights)), np.bincount(labels, top1, len(weights))
    f1 = np.mean([2 * right[c] / (taken[c] + np.sum(labels == c)) for c in np.unique(labels)])
    acc5 = np.mean(top5) if len(weights) >= 5 else None
    return {"acc1": np.mean(top1), "acc5": acc5, "mean_per_class_recall": recall, "macro_f1": f1}


def evaluation_of(encoder, images, names, labels, prompts="simple"):
    """Of an array of images."""
    labels = np.asarray(labels, np.int32)
    images = image_batches(images, encoder, label=labels, index=np.arange(len(images), dtype=np.int32))
    texts = prompt_batches(encoder, TOKENIZER, names, templates(prompts))
    keys = tuple(f"{i}.png" for i in range(len(labels)))
    return ZeroshotEvaluation(encoder, images, texts, Classes(tuple(names), labels, keys))


@pytest.mark.parametrize("prompts", ["plain", "simple"])
def test_class_embeddings_are_ensembled(encoder, model, params, prompts):
    prompts = templates(prompts)
    texts = prompt_batches(encoder, TOKENIZER, WORDS, prompts)
    evaluation = ZeroshotEvaluation(encoder, NONE, texts, Classes(tuple(WORDS), np.zeros(0, np.int32), ()))
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
    results = evaluation_of(encoder, images, names, labels).run(params)
    found = results.metrics
    assert found == pytest.approx(want, abs=1e-12)
    assert (found["acc5"] is None) == (len(names) < 5)
    (examples,) = results.examples
    assert list(examples.keys) == [f"{i}.png" for i in range(37)]
    means = {name: values.mean() for name, values in examples.values.items()}
    assert means == pytest.approx({name: value for name, value in want.items() if value is not None and name != "macro_f1"})
    assert list(examples.facts["class"]) == [names[i] for i in labels]
    assert list(examples.facts["predicted"]) == [names[i] for i in (z @ weights.T).argmax(1)]


def compare(cosines, labels):
    """The comparison alone, on chosen cosines: image i is the i-th unit vector, so that `weights` are the cosines."""
    cosines = np.asarray(cosines, np.float32)
    found = jax.jit(zeroshot._compare)(jnp.asarray(cosines.T), jnp.eye(len(cosines)), jnp.asarray(labels, jnp.int32))
    return Predictions(tuple(WORDS), tuple(map(str, labels)), np.asarray(labels), *map(np.asarray, found), votes=np.zeros(0))


def test_a_tie_counts_its_chance():
    six = compare([[0.5] * 6], [3])
    assert six.hits(1) == pytest.approx(1 / 6)
    assert six.hits(5) == pytest.approx(5 / 6)
    assert compare([[0.5, 0.9, 0.5, 0.5]], [3]).hits(1) == 0
    assert compare([[0.5, 0.9, 0.5, 0.5]], [3]).hits(2) == pytest.approx(1 / 3)
    assert compare([[0.5, 0.5 + 1e-7, 0]], [0]).hits(1) == 0.5  # rounding is no difference
    assert compare([[0.5, 0.5 + 1e-5, 0]], [1]).hits(1) == 1
    assert compare([[np.nan] * 3], [0]).hits(1) == 0
    found = compare([[0.1, 0.9, 0.3]], [2])
    assert (found.nearest.tolist(), found.hits(1), found.hits(2)) == ([[1, 2, 0]], 0, 1)


def test_two_equal_names_cost_nothing(params, images):
    """Within one image of argmax, which takes the first of equal ones."""
    encoder = Encoder(MODEL, mesh_of("1"), 13)
    names, labels = [*WORDS[:4], WORDS[1]], np.arange(37) % 5
    evaluation = evaluation_of(encoder, images, names, labels)
    z = np.concatenate([np.asarray(z) for z, _ in encoder.stream(params, evaluation.images)])[:37]
    nearest = (z @ np.asarray(evaluation.class_embeddings(params)[:4]).T).argmax(1)
    hits = np.where(np.isin(labels, (1, 4)), (nearest == 1) / 2, nearest == labels)
    assert 0.5 in hits
    found = evaluation.run(params).metrics["acc1"]
    assert found == pytest.approx(hits.mean())
    assert abs(found - np.mean(nearest == labels)) * 37 <= 1


def test_a_collapsed_model_gets_what_chance_does(params, images):
    encoder = Encoder(MODEL, mesh_of("1"), 13)
    evaluation = evaluation_of(encoder, images, WORDS, np.arange(37) % 11)
    evaluation.class_embeddings = lambda _: jnp.ones((11, 8)) / 8**0.5
    found, n = evaluation.run(params).metrics, np.bincount(np.arange(37) % 11)
    f1 = np.mean(2 * n / 11 / (37 / 11 + n))  # 1/11 where classes are equally frequent
    assert found == pytest.approx({"acc1": 1 / 11, "acc5": 5 / 11, "mean_per_class_recall": 1 / 11, "macro_f1": f1})


def test_recall_weighs_classes_and_accuracy_images(params):
    """Nine of A, one of B, all are taken for A; one without a label is left out."""
    encoder = Encoder(MODEL, mesh_of("1"), 11)
    evaluation = evaluation_of(encoder, np.zeros((11, 8, 8, 3), np.uint8), ["A", "B"], [0] * 9 + [1, -1])
    z = next(encoder.stream(params, evaluation.images))[0][0]
    evaluation.class_embeddings = lambda _: jnp.stack([z, -z])
    results = evaluation.run(params)
    assert results.metrics == {"acc1": 0.9, "acc5": None, "mean_per_class_recall": 0.5, "macro_f1": pytest.approx(9 / 19)}
    assert len(results.examples[0].keys) == 10
    assert len(results.predictions.keys) == 11


def test_predictions_are_a_table(params, images, tmp_path):
    encoder = Encoder(MODEL, mesh_of("8"), 16)
    evaluation = evaluation_of(encoder, images, WORDS[:3], [0, -1, 2] + [1] * 34)
    evaluation.run(params).predictions.write(tmp_path / "new" / "p.csv")
    with open(tmp_path / "new" / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "label", "class1", "cosine1", "class2", "cosine2", "class3", "cosine3"]
    assert [row["key"] for row in rows] == [f"{i}.png" for i in range(37)]
    assert [row["label"] for row in rows[:4]] == [WORDS[0], "", WORDS[2], WORDS[1]]
    z = np.concatenate([np.asarray(z) for z, _ in encoder.stream(params, evaluation.images)])[:37]
    cosines = z @ np.asarray(evaluation.class_embeddings(params)).T
    order = np.argsort(-cosines, 1)
    for i, row in enumerate(rows):
        assert [row[f"class{k}"] for k in (1, 2, 3)] == [WORDS[j] for j in order[i]]
        assert [float(row[f"cosine{k}"]) for k in (1, 2, 3)] == pytest.approx(list(cosines[i, order[i]]), abs=1e-6)


def test_order_of_the_classes_and_number_of_devices_do_not_matter(params, images):
    labels = np.arange(37) % 11
    order = np.random.default_rng(0).permutation(11)
    runs = []
    for mesh in ("1", "8"):
        encoder = Encoder(MODEL, mesh_of(mesh), 16)
        runs.append(evaluation_of(encoder, images, WORDS, labels).run(params).metrics)
    runs.append(evaluation_of(encoder, images, [WORDS[i] for i in order], np.argsort(order)[labels]).run(params).metrics)
    assert runs[0] == runs[1] == pytest.approx(runs[2], abs=1e-12)


def test_a_device_holds_only_its_images_cosines():
    mesh = mesh_of("8")
    encoder = Encoder(MODEL, mesh, 1024)
    evaluation = ZeroshotEvaluation(encoder, NONE, NONE, Classes(("",) * 4096, np.zeros(0, np.int32), ()))

    def shape(*shape, dtype=jnp.float32, rows=False):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=(over_rows if rows else replicated)(mesh))

    args = shape(4096, 8), shape(1024, 8, rows=True), shape(1024, dtype=jnp.int32, rows=True)
    used = evaluation._compare.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < (4 * 1024 * 4096) / 2  # three times its eighth of the batch's cosines: sorting takes two


@pytest.mark.parametrize("mesh", ["1", "2x2x2"])
def test_several_labels_give_mean_average_precision(params, images, mesh):
    """The last image can't be read."""
    encoder = Encoder(MODEL, mesh_of(mesh), 16)
    positive = np.random.default_rng(0).random((38, 11)) < 0.3
    positive[:, 4] = False
    evaluation = evaluation_of(encoder, images, WORDS, [-1] * 37)
    keys = tuple(f"{i}.png" for i in range(38))
    evaluation.classes = Classes(tuple(WORDS), np.full(38, -1, np.int32), keys, positive=positive)
    z = np.concatenate([np.asarray(z) for z, _ in encoder.stream(params, evaluation.images)])[:37]
    cosines = z @ np.asarray(evaluation.class_embeddings(params)).T
    results = evaluation.run(params)
    want = precision_per_class(cosines, positive[:37])
    assert want[4] == 0 < want.max() < 1
    assert results.metrics == pytest.approx({"mean_average_precision": want.mean()})
    (examples,) = results.examples
    assert list(examples.keys) == WORDS
    assert examples.values["mean_average_precision"] == pytest.approx(want)
    assert results.predictions.keys == keys[:37]
    assert results.predictions.nearest[:, 0].tolist() == cosines.argmax(1).tolist()


def test_groups_give_the_accuracy_in_the_worst_one(params, images):
    encoder = Encoder(MODEL, mesh_of("8"), 16)
    labels, groups = np.array([-1, *range(36)]) % 11, np.arange(37) % 4 - 1
    evaluation = evaluation_of(encoder, images, WORDS, labels)
    assert evaluation.run(params).metrics.keys() == {"acc1", "acc5", "mean_per_class_recall", "macro_f1"}
    keys = evaluation.classes.keys
    evaluation.classes = Classes(tuple(WORDS), evaluation.classes.labels, keys, groups=groups)
    results = evaluation.run(params)
    hits = {k: results.predictions.hits(k) for k in (1, 5)}
    worst = {name: min(hits[k][groups == g].mean() for g in range(3)) for name, k in (("acc_wg", 1), ("acc_top5_wg", 5))}
    assert worst["acc_top5_wg"] > worst["acc_wg"]
    assert {name: results.metrics[name] for name in worst} == pytest.approx(worst)
