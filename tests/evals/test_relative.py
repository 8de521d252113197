import numpy as np
import pytest

from clipjax.config import ConfigError
from clipjax.evals import relative as module
from clipjax.evals.relative import Pairs, compare, described, jaccard, ranks, relative


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def run():
    """Forty pairs and two hundred anchors of a run."""
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(240, 16)))
    texts = unit(images + 0.15 * rng.normal(size=(240, 16)))
    number = np.arange(240)
    return Pairs(images[:40], texts[:40], number[:40]), Pairs(images[40:], texts[40:], number[40:])


def turned(space, seed=1, width=16):
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0][:16].astype(np.float32)
    return Pairs(space.image @ turn, space.text @ turn, space.number)


@pytest.mark.parametrize("width", [16, 24])
def test_a_turned_space_is_the_same_one(run, width):
    own = relative(run[0], run[0], run[1], run[1])
    found = relative(run[0], turned(run[0], width=width), run[1], turned(run[1], width=width))
    same = {name: value for name, value in own.items() if not name.startswith("absolute")}
    assert {name: found[name] for name in same} == pytest.approx(same, abs=1e-5)
    for what in ("image", "text"):
        assert [found[f"{what}_{name}"] for name in ("cosine", "mrr", "jaccard@10")] == pytest.approx([1, 1, 1], abs=1e-5)
        assert found[f"{what}_retrieval_recall@1"] > 0.8
        absolute = found[f"absolute_{what}_retrieval_recall@1"]
        assert absolute is None if width == 24 else absolute < 0.2
        assert own[f"absolute_{what}_retrieval_recall@1"] > 0.8
    assert (found["pairs"], found["anchors"]) == (40, 200)


def test_unrelated_runs_are_at_chance(run):
    rng = np.random.default_rng(3)
    other, anchors = (Pairs(unit(rng.normal(size=s.image.shape)), unit(rng.normal(size=s.text.shape)), s.number) for s in run)
    found = relative(run[0], other, run[1], anchors)
    assert found["image_retrieval_recall@1"] <= 4 / 40
    assert found["image_mrr"] < 0.25
    assert found["text_jaccard@10"] < 0.3


def test_which_run_gives_images_and_which_texts(run):
    """Run B has lost its images, and nothing but its own of them changes."""
    blind = Pairs(np.roll(run[0].image, 1, axis=0), run[0].text, run[0].number)
    assert relative(run[0], blind, run[1], run[1])["text_retrieval_recall@1"] > 0.8
    assert relative(blind, run[0], run[1], run[1])["text_retrieval_recall@1"] < 0.2


def test_ranks_and_jaccard_by_rows_are_those_of_the_matrix(run, monkeypatch):
    a, b = described(run[0].image, run[1].image), described(run[0].text, run[1].text)
    cosines = a @ b.T
    want = 1 + (cosines > np.diagonal(cosines)[:, None]).sum(1)
    whole = jaccard(a, b)
    monkeypatch.setattr(module, "AT_ONCE", 100)
    np.testing.assert_array_equal(ranks(a, b).rank(), want)
    assert jaccard(a, b) == pytest.approx(whole) == pytest.approx(
        np.mean([
            len(x & y) / len(x | y)
            for x, y in (
                [set(np.argsort(-np.delete(z @ z[i], i))[:10]) for z in (a, b)]
                for i in range(40)
            )
        ])
    )  # fmt: skip
    assert jaccard(a[:10], b[:10]) is None
    np.testing.assert_array_equal(ranks(np.ones((5, 1)), np.ones((5, 1))).rank(), [3] * 5)  # a collapsed run


def test_pairs_and_anchors_are_those_that_both_runs_have(run, monkeypatch):
    pairs, anchors = run
    some = pairs.at(np.array([1, 5, 7, 8])), anchors.at(np.arange(50, 150))
    others = pairs.at(np.array([0, 5, 7, 8, 9])), anchors.at(np.arange(60, 240))
    both = pairs.at(np.array([5, 7, 8])), anchors.at(np.arange(60, 150))
    found = compare(some, others, "emoji/test")
    assert (found["pairs"], found["anchors"]) == (3, 90)
    assert found == pytest.approx(relative(both[0], both[0], both[1], both[1]))
    with pytest.raises(ConfigError, match=r"'emoji/test': no example, or no anchor, has an image that can be read"):
        compare((pairs.at(np.array([1])), anchors), others, "emoji/test")
    monkeypatch.setattr(module, "ANCHORS", 20)
    assert compare(some, others, "emoji/test")["anchors"] == 20
