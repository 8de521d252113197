import dataclasses
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax.config import ConfigError, Data
from clipjax.config import Geometry as Config
from clipjax.evals import geometry as g
from clipjax.evals.encoder import Encoder
from clipjax.evals.geometry_plot import plane, plot
from clipjax.evals.report import png_name, save_png
from tests.evals.tiny import MODEL, TOKENIZER, WORDS, mesh_of, tokenize

READABLE = [0, 1, 2, 3, 5, 6, 7, 8, 9]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sphere(n, d, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


def offset(a, n, d, noise, seed=0):
    """Centred pairs z, w, shifted by 2a along an axis of their own."""
    z = sphere(n // 2, d, seed)
    w = unit(z + noise * sphere(n // 2, d, seed + 1))
    z, w = np.concatenate([z, -z]), np.concatenate([w, -w])
    shrink, axis = (1 - a * a) ** 0.5, np.full((n, 1), a)
    return np.hstack([shrink * z, axis]), np.hstack([shrink * w, -axis])


@pytest.fixture(scope="module")
def fixture():
    """Four pairs in three dimensions, in closed form."""
    i, j = np.arange(4.0)[:, None], np.arange(3.0)[None, :]
    x = np.sin(1 + 3 * i + 2 * j * j + 0.5 * i * j)
    return unit(x), unit(x + 0.7 * np.cos(2 + 5 * i + 2 * j + i * j))


def test_the_published_values(fixture):
    x, y = fixture
    want = {
        "centroid_distance": 0.5324645026, "relative_modality_gap": 0.1986465774, "uniformity_image": -2.4259557058,
        "uniformity_text": -1.9719213025, "cross_uniformity": -2.304389325, "alignment": 0.5246340799,
        "rankme_image": 2.3926071554, "positive_cosine": (0.7267383052 + 0.526781799 + 0.8873643012 + 0.8098474347) / 4,
    }  # fmt: skip
    found = g.geometry(x, y)
    assert {name: found[name] for name in want} == pytest.approx(want, abs=1e-10)


def dense_uniformity(x, y):
    squared = np.square(x[:, None] - y[None]).sum(-1)
    return np.log(np.exp(-2 * squared)[~np.eye(len(x), dtype=bool)].mean())


@pytest.mark.parametrize("rows", [1, 7, 10, 20, 64])
def test_streamed_uniformity_is_the_dense_one(rows, monkeypatch):
    monkeypatch.setattr(g, "BLOCK_ROWS", rows)
    x, y = sphere(20, 5), unit(sphere(20, 5) + 0.5 * sphere(20, 5, 1))
    for a, b in ((x, x), (y, y), (x, y), (y, x)):
        assert g.uniformity(a, b) == pytest.approx(dense_uniformity(a, b), rel=1e-13)


def test_uniformity_in_closed_form():
    angles = 2 * np.pi * np.arange(3) / 3
    assert g.uniformity(*[np.stack([np.cos(angles), np.sin(angles)], 1)] * 2) == pytest.approx(-6)
    for n in (2, 4, 64):
        simplex = unit(np.eye(n) - 1 / n)
        assert g.uniformity(simplex, simplex) == pytest.approx(-4 * n / (n - 1))
    pole = np.repeat([[1.0, 0.0]], 9, 0)
    assert g.uniformity(pole, pole) == pytest.approx(0)
    assert g.uniformity(pole, -pole) == pytest.approx(-8)
    even = sphere(4000, 16)
    assert g.uniformity(even, even) == pytest.approx(
        -3.513036, abs=0.01
    )  # the uniform law on the sphere, -4 + log(Gamma(8) I_7(4) / 2^7)


def test_no_matrix_of_all_pairs():
    x = sphere(4096, 4)
    tracemalloc.start()
    g.uniformity(x, x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4096**2 / 4


def test_the_offset_is_what_is_measured():
    x, y = offset(0.41, 1000, 32, noise=0.5)
    found = g.geometry(x, y)
    assert found["centroid_distance"] == pytest.approx(0.82, abs=1e-12)
    assert found["linear_separability"] == 1
    closed = g.geometry(*offset(0, 1000, 32, noise=0.5))
    assert closed["centroid_distance"] == pytest.approx(0, abs=1e-12)
    assert closed["relative_modality_gap"] < found["relative_modality_gap"]
    # CLIP's loss can't see the offset, alignment and uniformity can
    assert found["alignment"] > closed["alignment"] + 0.6
    assert found["uniformity_image"] > closed["uniformity_image"] + 0.3


def test_a_cone_lowers_rankme_unless_it_is_centred():
    cone, ball = (g.geometry(*offset(a, 1000, 32, noise=0.5)) for a in (0.8, 0))
    assert cone["rankme_image"] < ball["rankme_image"] - 4
    assert cone["rankme_centred_image"] == pytest.approx(ball["rankme_centred_image"], abs=1e-3)


def test_relative_modality_gap_against_all_pairs():
    x, y = offset(0.2, 40, 6, noise=1.0)

    def distance(a, b):
        return (1 - a @ b.T) / 2

    off = ~np.eye(40, dtype=bool)
    within = (distance(x, x)[off].mean() + distance(y, y)[off].mean()) / 2
    between = np.diagonal(distance(x, y)).mean()
    assert g.relative_modality_gap(x, y) == pytest.approx(between / (between + within), rel=1e-13)
    assert g.relative_modality_gap(x, x) == pytest.approx(0, abs=1e-15)
    assert g.relative_modality_gap(sphere(4000, 64), sphere(4000, 64, 1)) == pytest.approx(0.5, abs=0.01)


def newton(z, label, c):
    """Another solver of the same problem: Newton's method on penalty and data, the intercept unpenalised."""
    a = np.hstack([z, np.ones((len(z), 1))])
    penalty = np.diag([*np.ones(z.shape[1]), 0.0])
    w = np.zeros(a.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-a @ w))
        gradient = penalty @ w + c * a.T @ (p - label)
        w -= np.linalg.solve(penalty + c * (a.T * (p * (1 - p))) @ a, gradient)
    assert np.abs(gradient).max() < 1e-10
    return w


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_regression_is_at_its_optimum(c):
    x, y = offset(0.1, 200, 8, noise=2.0)
    z = np.concatenate([x, y[:120]])  # unbalanced: the intercept has work to do
    label = np.arange(len(z)) >= len(x)
    np.testing.assert_allclose(g.logistic_regression(z, label, c), newton(z, label, c), atol=2e-5)


def test_separability_of_mixed_and_of_separate_clouds():
    mixed = g.linear_separability(sphere(5000, 32), sphere(5000, 32, 1))
    assert mixed == pytest.approx(0.5, abs=0.03)
    assert g.linear_separability(sphere(5000, 32), sphere(5000, 32, 1)) == mixed  # the same fifth
    assert g.linear_separability(*offset(0.15, 2000, 32, noise=0.5)) > 0.99
    x, y = offset(0.41, 6, 4, noise=0.5)
    assert g.linear_separability(x, y) == 1  # of 6 pairs 2 are held out


def test_both_sides_of_a_pair_are_held_out():
    """With few pairs in many dimensions a classifier memorises one side of a pair. It must not be tested on the other side."""
    x = sphere(100, 256)
    assert g.linear_separability(x, x) == 0.5
    y = unit(x + 0.05 * sphere(100, 256, 1))
    assert g.linear_separability(x, y) == pytest.approx(0.5, abs=0.11)
    order = np.random.default_rng(0).permutation(200)  # and so it would be by points
    z, label = np.concatenate([x, y])[order], order >= 100
    w = g.logistic_regression(z[40:], label[40:])
    assert np.mean((z[:40] @ w[:-1] + w[-1] > 0) == label[:40]) < 0.3


def test_rankme():
    rng = np.random.default_rng(0)
    orthonormal = np.linalg.qr(rng.standard_normal((50, 7)))[0]
    assert g.rankme(g.singular_values(orthonormal)) == pytest.approx(7, rel=1e-5)
    assert g.rankme(g.singular_values(np.repeat(sphere(1, 7), 50, 0))) == pytest.approx(1, abs=1e-4)
    z = sphere(50, 7) * np.arange(1, 8)
    turned = 3 * z @ np.linalg.qr(rng.standard_normal((7, 7)))[0]
    assert g.rankme(g.singular_values(turned)) == pytest.approx(g.rankme(g.singular_values(z)), rel=1e-12)
    gram = np.linalg.eigvalsh(z.T @ z)[::-1] ** 0.5
    np.testing.assert_allclose(g.singular_values(z), gram, rtol=1e-12)
    assert g.singular_values(sphere(5, 9)).shape == (5,)  # fewer rows than dimensions


def test_explained_variance():
    z = sphere(60, 4) * [4, 1, 2, 3]
    curve = g.explained_variance(g.singular_values(z - z.mean(0)))
    np.testing.assert_allclose(np.diff(curve, prepend=0), np.linalg.eigvalsh(np.cov(z.T))[::-1] / np.trace(np.cov(z.T)))
    found = g.geometry(unit(z), unit(z))
    assert len(found["explained_variance_text"]) == 4
    assert found["explained_variance_text"][-1] == pytest.approx(1)


def test_a_collapsed_model_has_what_is_defined():
    same = np.repeat(sphere(1, 8), 20, 0)
    found = g.geometry(same, same)
    assert {name for name, value in found.items() if value is None} == {
        "relative_modality_gap", "rankme_centred_image", "rankme_centred_text", "explained_variance_image",
        "explained_variance_text",
    }  # fmt: skip
    assert found["linear_separability"] == 0.5
    assert found["uniformity_image"] == found["cross_uniformity"] == pytest.approx(0, abs=1e-12)
    assert plot(g.GeometryResults(found, same, same), "one point").size == (1440, 768)


@pytest.fixture(scope="module", params=["1", "8"])
def evaluation(request, tsv):
    data = Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1)
    return g.GeometryEvaluation.prepare(Encoder(MODEL, mesh_of(request.param), 4), TOKENIZER, data, Config())


def test_pairs_are_readable_images_and_their_main_captions(evaluation, model, params, images, tsv):
    found = evaluation.run(params)
    np.testing.assert_allclose(found.image, model.encode_image(jnp.asarray(images[READABLE])), atol=1e-6)
    main = tokenize([WORDS[i % 9] for i in READABLE])
    np.testing.assert_allclose(found.text, model.encode_text(jnp.asarray(main)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.image, axis=1), 1, rtol=1e-15)
    assert found.metrics == g.geometry(found.image, found.text) | {"scale": pytest.approx(1 / 0.07), "bias": None}
    assert found.metrics["pairs"] == 9
    assert evaluation.run(params).metrics == found.metrics
    assert evaluation.dataset == f"tsv:{tsv}/pairs.tsv"


def test_the_bias_of_a_model_that_has_one(params, tsv):
    biased = Encoder(dataclasses.replace(MODEL, init_bias=-10.0), mesh_of("1"), 4)
    evaluation = g.GeometryEvaluation.prepare(biased, TOKENIZER, Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1), Config())
    found = evaluation.run(params | {"bias": jnp.float32(-9.5), "log_scale": jnp.log(jnp.float32(10))}).metrics
    assert (found["scale"], found["bias"]) == (pytest.approx(10, rel=1e-6), -9.5)


def test_what_can_not_be_measured_is_refused(evaluation, params, tsv):
    broken = params | {"text": params["text"] | {"tokens": params["text"]["tokens"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match=r"tsv:.*: embeddings are not finite; evaluate an earlier checkpoint, RUN@STEP"):
        evaluation.run(broken)
    few = tsv / "few.tsv"
    few.write_text("filepath\ttitle\n" + "".join(f"{i}.png\t{WORDS[i]}\n" for i in range(4)))
    with pytest.raises(ConfigError, match=r"data\.spec = 'tsv:.*few\.tsv': has 4 pairs of .* name a split with at least 5"):
        g.GeometryEvaluation.prepare(evaluation.encoder, TOKENIZER, Data(spec=f"tsv:{few}", workers=1), Config())
    few.write_text(few.read_text() + f"4.png\t{WORDS[4]}\n")  # which can't be read: known once it was tried
    with pytest.raises(ConfigError, match=r"has 4 pairs of a readable image"):
        g.GeometryEvaluation.prepare(evaluation.encoder, TOKENIZER, Data(spec=f"tsv:{few}", workers=1), Config()).run(params)


def test_the_plane_is_that_of_both():
    x, y = offset(0.41, 400, 12, noise=0.3)
    one, other, shares = plane(x, y)
    np.testing.assert_allclose((other - one).mean(0), [0.82, 0], atol=1e-12)  # the gap has the most variance; text is right
    swapped, _, _ = plane(y, x)
    assert swapped.mean(0)[0] == pytest.approx(-0.41)
    both = np.concatenate([x, y])
    assert shares.tolist() == pytest.approx((np.linalg.eigvalsh(np.cov(both.T)) / np.trace(np.cov(both.T)))[:-3:-1].tolist())
    np.testing.assert_allclose(np.concatenate([one, other]).var(0, ddof=1) / np.trace(np.cov(both.T)), shares)


def test_the_plot(tmp_path):
    x, y = offset(0.41, 400, 8, noise=0.3)
    found = g.GeometryResults(g.geometry(x, y), x, y)
    save_png(tmp_path / "new" / "a.png", found.draw("run, step 1, on emoji/test"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 700
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0, 0, 0)} <= colours
    save_png(tmp_path / "b.png", found.draw("run, step 1, on emoji/test"))
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "new" / "a.png").read_bytes()


def test_names_of_png_files():
    assert png_name("emoji/test-000120") == "emoji-test-000120.png"
    long = png_name("tsv:/" + "folder/" * 60 + "pairs.tsv-000120")
    assert len(long) < 120
    assert long.endswith("folder-pairs.tsv-000120.png")
    wide = png_name("tsv:/" + "画像/" * 60 + "組.tsv-000120")
    assert len(wide.encode()) < 120
    assert wide.endswith("画像-組.tsv-000120.png")
