import numpy as np
import pytest
import scipy.special

from clipjax.config import ConfigError
from clipjax.evals.calibration import CalibrationEvaluation, best_temperature, ece, nll
from clipjax.evals.classes import Classes
from clipjax.evals.inputs import prompt_batches
from clipjax.evals.zeroshot import ZeroshotEvaluation
from tests.evals.tiny import TOKENIZER, WORDS, image_batches


def test_ece_of_two_bins_by_hand():
    """Two at 0.9 of which one is right, and one at 0.6 that is right: (|1 - 1.8| + |1 - 0.6|) / 3."""
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    assert ece(np.log(p), np.array([0, 1, 1])) == pytest.approx((0.8 + 0.4) / 3)


def test_certain_predictions_have_a_bin_and_equal_classes_share_the_hit():
    assert ece(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 1])) == 0
    assert ece(np.zeros((3, 4)), np.array([0, 1, 2])) == pytest.approx(0)  # confidence 1/4, and right by chance 1/4


def test_the_temperature_of_the_labels_is_found():
    rng = np.random.default_rng(0)
    logits = 6 * rng.normal(size=(20_000, 5))
    draws = rng.random((20_000, 1))
    labels = (scipy.special.softmax(logits / 3, axis=1).cumsum(1) < draws).sum(1)
    found = best_temperature(logits, labels)
    assert found == pytest.approx(3, rel=0.03)
    assert ece(logits / found, labels) < 0.02 < 0.1 < ece(logits, labels)
    want = -scipy.special.log_softmax(logits, axis=1)[np.arange(20_000), labels]
    np.testing.assert_allclose(nll(logits, labels), want, atol=1e-12)


def evaluation_of(encoder, images, labels):
    batches = image_batches(images, encoder, label=labels, index=np.arange(len(labels), dtype=np.int32))
    prompts, keys = prompt_batches(encoder, TOKENIZER, WORDS, ("{c}",)), tuple(f"k{i}" for i in range(len(labels)))
    return CalibrationEvaluation(ZeroshotEvaluation(encoder, batches, prompts, Classes(tuple(WORDS), labels, keys)))


def test_half_of_the_images_choose_the_temperature(params, model, images, encoder):
    labels = np.where(np.arange(37) % 5 == 4, -1, np.arange(37) % 11).astype(np.int32)  # one in five has none
    evaluation = evaluation_of(encoder, images, labels)
    results = evaluation.run(params)
    weights = np.asarray(evaluation.zeroshot.class_embeddings(params))
    rated = np.flatnonzero(labels >= 0)
    logits = np.asarray(model.encode_image(images[rated])) @ weights.T * np.exp(float(params["log_scale"]))
    temperature = best_temperature(logits[::2], labels[rated][::2])
    want = {"images": len(rated[1::2]), "temperature": temperature}
    for name, scaled in (("", logits[1::2]), ("_calibrated", logits[1::2] / temperature)):
        want |= {f"ece{name}": ece(scaled, labels[rated][1::2]), f"nll{name}": nll(scaled, labels[rated][1::2]).mean()}
    assert results.metrics == pytest.approx(want, rel=1e-3)
    assert results.examples[0].keys == [f"k{i}" for i in rated[1::2]]
    with pytest.raises(ConfigError, match="has fewer than two labelled images that can be read"):
        evaluation_of(encoder, images[:1], labels[:1]).run(params)
