import json

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.evals.composed import WEIGHTS, Asked, ComposedEvaluation
from clipjax.evals.compositions import Composition, read_compositions, skin_tones
from clipjax.evals.named import Picture
from tests.evals.tiny import TOKENIZER


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def asked(questions, keys):
    pictures = [np.array([keys.index(name) for name, _ in question.pictures]) for question in questions]
    return Asked("toy", [], questions, pictures)


def evaluated(z, t, questions, weight=1.0, readable=None):
    """The results on pictures that are called "0", "1", ... and texts "a", "b", ..., in two sources."""
    there = np.ones(len(z), bool) if readable is None else readable
    halves = [lambda _, s=s: (z[s], there[s]) for s in (slice(0, 2), slice(2, None))]
    numbers = {text: i for i, text in enumerate("abcdef"[: len(t)])}
    task = asked(questions, [str(i) for i in range(len(z))])
    return ComposedEvaluation(halves, lambda _: (t, np.ones(len(t), bool)), task, numbers, weight).run({})


def question(reference, condition, *targets, **more):
    return Composition("k", Picture(reference), condition, tuple(map(Picture, targets)), **more)


@pytest.fixture(scope="module")
def shifted():
    """Three pictures, and the same moved from text `a` to text `b`."""
    rng = np.random.default_rng(0)
    z, t = unit(rng.normal(size=(3, 16))), unit(rng.normal(size=(2, 16)))
    return np.concatenate([z, unit(z + t[1] - t[0])]), t


def test_a_picture_and_the_difference_of_two_texts_find_the_moved_picture(shifted):
    there = [question(str(i), "b", str(i + 3), source="a") for i in range(3)]
    assert evaluated(*shifted, there).metrics["recall@1"] == 1
    back = [question(str(i + 3), "b", str(i), source="a") for i in range(3)]  # the displacement is the other way round
    assert evaluated(*shifted, back).metrics["recall@1"] < 1


def test_recalls_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    z, t = unit(rng.normal(size=(12, 4))), unit(rng.normal(size=(3, 4)))
    questions = [question(str(i), "abc"[i % 3], str((i + 5) % 12)) for i in range(12)]
    results = evaluated(z, t, questions, weight=0.7)

    def rank(i, a, b):
        cosines = z @ (a * z[i] + b * t[i % 3])
        cosines[i] = -np.inf
        return 1 + np.sum(cosines > cosines[(i + 5) % 12])

    def recall(k, a, b):
        return np.mean([rank(i, a, b) <= k for i in range(12)])

    metrics = results.metrics
    assert [metrics[f"recall@{k}"] for k in (1, 2, 3, 5, 10)] == [recall(k, 1, 0.7) for k in (1, 2, 3, 5, 10)]
    assert metrics["picture_alone_recall@1"] == recall(1, 1, 0)
    assert metrics["text_alone_recall@1"] == recall(1, 0, 1)
    assert metrics["weights"] == list(WEIGHTS)
    assert metrics["recall@1_by_weight"] == [recall(1, 1, weight) for weight in WEIGHTS]
    (examples,) = results.examples
    assert examples.groups == [str(i) for i in range(12)]
    assert {name: np.mean(values) for name, values in examples.values.items()} == pytest.approx(
        {name: metrics[name] for name in config.Composed.metrics}
    )


def test_a_collapsed_model_finds_k_of_the_others_and_galleries_and_several_targets_count():
    z, t = np.ones((11, 4), np.float32) / 2, np.ones((1, 4), np.float32) / 2
    metrics = evaluated(z, t, [question("0", "a", "1")]).metrics
    assert [metrics[f"recall@{k}"] for k in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1])
    metrics = evaluated(z, t, [question("0", "a", "1", "2")]).metrics
    assert metrics["recall@1"] == pytest.approx(0.2)
    metrics = evaluated(z, t, [question("0", "a", "1", gallery=tuple(map(Picture, "234")))]).metrics
    assert metrics["recall@1"] == pytest.approx(1 / 4)


def test_weights_questions_without_targets_and_pictures_that_cannot_be_read():
    z = unit(np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0]]))
    right, wrong = question("0", "a", "1", weight=3.0), question("0", "a", weight=1.0)
    results = evaluated(z, z[:1], [right, wrong])
    assert results.metrics["recall@1"] == pytest.approx(0.75)  # as SIMAT, where nothing may be right
    assert np.mean(results.examples[0].values["recall@1"]) == pytest.approx(0.75)
    unread = np.array([True, True, False, True])
    results = evaluated(z, z[:1], [right, question("0", "a", "2"), question("2", "a", "1"), wrong], readable=unread)
    assert results.metrics["recall@1"] == pytest.approx(0.75)
    assert np.isnan(results.examples[0].values["recall@1"]).tolist() == [False, True, True, False]
    with pytest.raises(ConfigError, match="no question has a picture that can be read"):
        evaluated(z, z[:1], [right], readable=np.zeros(4, bool))


def test_skin_tones():
    keys = ["1f44d", "261d-fe0f", "1f44d-1f3ff", "261d-1f3fb", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f600", "1f44e-1f3fd"]
    first, second = skin_tones(set(keys), keys)
    assert (first.reference, first.condition, first.targets) == (Picture("1f44d"), "dark skin tone", (Picture("1f44d-1f3ff"),))
    assert (second.key, second.reference, second.condition) == ("261d-1f3fb", Picture("261d-fe0f"), "light skin tone")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(reference="a", condition="b"), "question 0 lacks 'targets'; it must be"),
        (dict(reference=["a", [1, 2]], condition="b", targets=[]), r"question 0 has \['a', \[1, 2\]\], which must be"),
        (dict(reference="a", condition="b", targets=[], weight=0), "the weights of its questions must add up"),
    ],
)
def test_nonsense_is_refused(tmp_path, row, message):
    (tmp_path / "q.json").write_text(json.dumps([row]))
    with pytest.raises(ConfigError, match=message):
        read_compositions(str(tmp_path / "q.json"))
    with pytest.raises(ConfigError, match=r"weight = -1\.0: must not be negative"):
        config.Composed(weight=-1.0)


def test_a_file_of_questions_on_a_dataset(tsv, model, params, images, encoder):
    part = ["1.png", [0, 0, 6, 6]]
    rows = [
        dict(key=1, reference="0.png", condition="fox", targets=["2", "3.png"]),
        dict(reference="4", condition="a", targets=["1"]),
    ]
    rows.append(dict(reference=part, condition="hen", source="fox", targets=["3"], gallery=["0", "2"]))
    (tsv / "composed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = config.Composed(data=f"tsv:{tsv}/pairs.tsv", questions=str(tsv / "composed.jsonl"))
    evaluation = ComposedEvaluation.prepare(encoder, TOKENIZER, Data(spec=wanted.data), wanted)
    (examples,) = evaluation.run(params).examples
    assert examples.keys == ["1", "1", "2"]
    found = examples.values["recall@1"]
    assert np.isnan(found[1])  # its reference can't be read
    z, t = np.asarray(model.encode_image(images[:4])), np.asarray(model.encode_text(TOKENIZER.encode(["fox"])[0]))[0]
    cosines = z @ (z[0] + 0.5 * t)
    assert found[0] == float(max(cosines[[2, 3]]) > cosines[1])  # pictures that no question names, as 5, are not searched here
    assert evaluation.dataset == wanted.dataset(Data(spec="emoji")) == f"tsv:{tsv}/pairs.tsv+composed"
    with pytest.raises(ConfigError, match="has no questions of its own: name a file of them"):
        ComposedEvaluation.prepare(encoder, TOKENIZER, Data(spec=wanted.data), config.Composed())
