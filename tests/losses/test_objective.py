"""The configured terms: each by its equation, weighted, named, over captions, on every mesh; and what is logged beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, losses, sharding
from clipjax.losses import Rows, objective
from tests.losses import reference
from tests.losses.meshes import mesh_of

B, K, WIDTH, SCALE, BIAS = 16, 3, 8, 14.3, -5.0
IDS = np.int32([0, 1, 1, 3, 4, 5, 6, 7, 8, 1, 10, 11, 4, 13, 14, 15])
X, Y = (jnp.float32(z) for z in reference.random_pairs(B, WIDTH))
MANY = jnp.float32(reference.random_pairs(B, WIDTH, texts=K)[1]).reshape(B, K, WIDTH)
TEACHER = tuple(jnp.float32(z) for z in reference.random_pairs(B, 5, seed=1))
STARTS = tuple(jnp.float32(z) for z in reference.random_pairs(B, WIDTH, seed=3))


def total(*terms, rows=None, scale=SCALE, **kw):
    return objective(terms, rows or Rows(X, Y), jnp.float32(scale), jnp.float32(BIAS), **kw)[:2]


def cyclip(x, y):
    in_modal, cross_modal = losses.cyclip(x, y)
    return 0.5 * in_modal + 2 * cross_modal


EQUATIONS = {  # a term, and what it stands for
    "softmax": (
        config.Softmax(image_weight=0.75, label_smoothing=0.1, reduction="sum"),
        lambda x, y: losses.clip_loss(x, y, SCALE, image_weight=0.75, label_smoothing=0.1, reduction="sum", ids=IDS),
    ),
    "sigmoid": (config.Sigmoid(), lambda x, y: losses.siglip_loss(x, y, SCALE, BIAS, ids=IDS)),
    "prefixes": (
        config.Softmax(prefixes=(2, 5)),
        lambda x, y: losses.matryoshka(losses.clip_loss, x, y, (2, 5), SCALE, ids=IDS),
    ),
    "sigmoid's prefixes": (
        config.Sigmoid(prefixes=(3, 8)),
        lambda x, y: losses.matryoshka(losses.siglip_loss, x, y, (3, 8), SCALE, BIAS, ids=IDS),
    ),
    "decoupled": (
        config.Decoupled(sigma=0.5, prefixes=(8,)),
        lambda x, y: losses.decoupled_loss(x, y, SCALE, sigma=0.5, ids=IDS),
    ),
    "hard_negative": (
        config.HardNegative(alpha=0.5, beta=0.5),
        lambda x, y: losses.hard_negative_loss(x, y, SCALE, alpha=0.5, beta=0.5, ids=IDS),
    ),
    "cwcl, image": (config.Cwcl(), lambda x, y: losses.cwcl_loss(x, y, SCALE)),
    "cwcl, text": (config.Cwcl(frozen="text"), lambda x, y: losses.cwcl_loss(y, x, SCALE)),
    "cyclip": (config.Cyclip(in_modal=0.5, cross_modal=2.0), cyclip),
    "distillation": (
        config.Distillation(teacher_scale=20.0),
        lambda x, y: losses.distillation_loss(x, y, SCALE, *TEACHER, 20.0),
    ),
    "uniformity": (config.Uniformity(t=3.0), lambda x, y: (losses.uniformity(x, t=3.0) + losses.uniformity(y, t=3.0)) / 2),
    "cross_uniformity": (config.CrossUniformity(t=3.0), lambda x, y: losses.cross_uniformity(x, y, t=3.0)),
    "alignment": (config.Alignment(), losses.alignment),
}


@pytest.mark.parametrize(("term", "equation"), EQUATIONS.values(), ids=EQUATIONS.keys())
def test_a_term_is_its_equation_of_every_caption(term, equation):
    loss, logged = total(term, rows=Rows(X, Y, IDS, TEACHER))
    np.testing.assert_allclose(loss, equation(X, Y), rtol=1e-6)
    assert logged[f"{term.kind}_loss"] == loss
    loss, _ = total(term, rows=Rows(X, MANY, IDS, TEACHER))
    np.testing.assert_allclose(loss, np.mean([equation(X, MANY[:, k]) for k in range(K)]), rtol=1e-5)


def test_what_is_preserved_is_the_vectors_of_the_image_and_of_the_main_caption():
    term = config.Preserve(mse=3.0, cosine=0.5)
    for text, main in ((Y, Y), (MANY, MANY[:, 0])):
        want = [reference.preserved(np.float64(z), np.float64(start)) for z, start in zip((X, main), STARTS, strict=True)]
        loss, logged = total(term, rows=Rows(X, text, teacher=STARTS))
        np.testing.assert_allclose(loss, np.mean([3 * mse + 0.5 * cosine for mse, cosine in want]), rtol=1e-6)
        assert logged == {"preserve_loss": loss}
    assert abs(total(term, rows=Rows(*STARTS, teacher=STARTS))[0]) < 1e-6


def test_multi_positive_takes_all_captions_and_all_of_an_id():
    term, of = config.MultiPositive(), functools.partial(losses.multi_positive_loss, X, scale=SCALE)
    unique = np.arange(B)
    texts = MANY.reshape(B * K, WIDTH)
    cases = [
        (Rows(X, Y, IDS), of(Y, image_ids=IDS, text_ids=IDS)),
        (Rows(X, MANY, IDS), of(texts, image_ids=IDS, text_ids=np.repeat(IDS, K))),
        (Rows(X, MANY), of(texts, image_ids=unique, text_ids=np.repeat(unique, K))),
        (Rows(X, Y), losses.clip_loss(X, Y, SCALE)),
    ]
    for rows, want in cases:
        np.testing.assert_allclose(total(term, rows=rows)[0], want, rtol=1e-6)


def test_terms_add_up_by_their_weights_and_are_logged_before_them():
    terms = (config.Softmax(weight=0.5), config.Sigmoid(weight=2.0), config.Alignment())
    loss, logged = total(*terms)
    parts = losses.clip_loss(X, Y, SCALE), losses.siglip_loss(X, Y, SCALE, BIAS), losses.alignment(X, Y)
    assert tuple(logged[f"{term.kind}_loss"] for term in terms) == parts
    np.testing.assert_allclose(loss, 0.5 * parts[0] + 2 * parts[1] + parts[2], rtol=1e-6)


def test_two_terms_of_a_kind_both_count_and_both_are_logged():
    loss, logged = total(config.Softmax(), config.Alignment(), config.Softmax(weight=2.0, label_smoothing=0.1))
    smoothed = losses.clip_loss(X, Y, SCALE, label_smoothing=0.1)
    assert (logged["softmax_0_loss"], logged["softmax_2_loss"]) == (losses.clip_loss(X, Y, SCALE), smoothed)
    assert "softmax_loss" not in logged
    np.testing.assert_allclose(loss, logged["softmax_0_loss"] + logged["alignment_loss"] + 2 * smoothed, rtol=1e-6)


@pytest.mark.parametrize("kind", [config.Softmax, config.Sigmoid])
def test_bfloat16_operands_are_an_option(kind):
    exact, _ = total(kind())
    half, _ = total(kind(dtype="bfloat16"))
    assert 0 < abs(half - exact) < 1e-2 * exact


def test_weight_zero_is_not_traced():
    terms = (config.Softmax(), config.Softmax(weight=0.0), config.Distillation(weight=0.0))  # there is no teacher to distil
    _, logged = total(*terms)
    assert {name for name in logged if name.endswith("_loss")} == {"softmax_loss"}


@pytest.mark.parametrize(("terms", "want"), [(config.CUA, 5.8926994998), (config.CUAXU, 3.5883101748)], ids=["cua", "cuaxu"])
def test_presets_of_the_contrastive_gap(terms, want):
    """Golden values of `reference.fixture`, computed in float64."""
    x, y = (jnp.float32(reference.unit_rows(z)) for z in reference.fixture(4, 3))
    np.testing.assert_allclose(total(*terms, rows=Rows(x, y), scale=100.0)[0], want, rtol=1e-5)


MAPPED = {  # the equations are judged on meshes in test_equations; here, what the objective adds to them
    "captions with ids of their own": ((config.MultiPositive(), config.Uniformity()), Rows(X, MANY)),
    "the start": ((config.Softmax(), config.Preserve(mse=3.0, cosine=0.5)), Rows(X, MANY, None, STARTS)),
    "ids and a teacher": ((config.Softmax(), config.Distillation()), Rows(X, MANY, jnp.asarray(IDS), TEACHER)),
}


@pytest.mark.parametrize(("terms", "rows"), MAPPED.values(), ids=MAPPED.keys())
def test_a_mesh_changes_nothing(terms, rows):
    def gradients(fn):
        def value(image, text, scale):
            return fn(Rows(image, text, rows.ids, rows.teacher), scale, None)[:2]

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(rows.image, rows.text, jnp.float32(SCALE))

    (want, want_logged), want_grads = gradients(functools.partial(objective, terms))
    of_rows = functools.partial(objective, terms, axis=sharding.BATCH)
    (got, logged), grads = gradients(sharding.on_shards(of_rows, mesh_of(2, 4), rows=1))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert logged.keys() == want_logged.keys()
    for name in logged:
        np.testing.assert_allclose(logged[name], want_logged[name], rtol=1e-6, err_msg=name)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


def ranked(x, y, ids=None):
    """What is logged of the pairs, from the dense matrix."""
    cos = np.float64(x) @ np.float64(y).T
    mask = reference.negatives(len(cos), ids)
    rows, cols = (np.where(mask, cos, -np.inf).max(axis) for axis in (1, 0))
    own = np.diag(cos)
    return {
        "image_to_text_accuracy": (own > rows).mean(),
        "text_to_image_accuracy": (own > cols).mean(),
        "positive_cosine": own.mean(),
        "hardest_negative_cosine": (np.maximum(rows, -1).mean() + np.maximum(cols, -1).mean()) / 2,
    }


NOISY = tuple(jnp.float32(z) for z in reference.random_pairs(64, WIDTH, noise=1.5))
RANKING = {
    "softmax": (config.Softmax(),),
    "sigmoid": (config.Sigmoid(),),
    "decoupled": (config.Alignment(), config.Decoupled()),
    "hard_negative": (config.HardNegative(),),
    "cwcl": (config.Uniformity(), config.Cwcl(frozen="text")),
    "widest prefix": (config.Softmax(prefixes=(2, WIDTH)),),
}


@pytest.mark.parametrize("terms", RANKING.values(), ids=RANKING.keys())
def test_how_pairs_are_found_is_logged(terms):
    want = ranked(*NOISY)
    assert 0.1 < want["image_to_text_accuracy"] != want["text_to_image_accuracy"] < 0.9
    _, logged = total(*terms, rows=Rows(*NOISY))
    for name, value in want.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-5, err_msg=name)


def test_what_shares_an_id_is_no_mistake():
    cos = np.float64(NOISY[0]) @ np.float64(NOISY[1]).T - 9 * np.eye(64)
    ids = np.minimum(np.arange(64), cos.argmax(1)).astype(np.int32)  # many share one with their hardest negative
    want = ranked(*NOISY, ids)
    assert want["image_to_text_accuracy"] > ranked(*NOISY)["image_to_text_accuracy"]
    for term in (config.Softmax(), config.Sigmoid(), config.HardNegative()):
        _, logged = total(term, rows=Rows(*NOISY, ids))
        for name, value in want.items():
            np.testing.assert_allclose(logged[name], value, rtol=1e-5, err_msg=name)
    _, logged = total(config.Softmax(), rows=Rows(*NOISY, np.zeros(64, np.int32)))
    assert (logged["image_to_text_accuracy"], logged["hardest_negative_cosine"]) == (1, -1)


def test_collapsed_embeddings_are_never_accurate():
    """Whatever the rounding of the same cosine in one place and in another."""
    for seed in range(20):
        same = jnp.broadcast_to(jnp.float32(reference.random_pairs(1, WIDTH, seed=seed)[0]), (8, WIDTH))
        _, logged = total(config.Softmax(), rows=Rows(same, same))
        assert (logged["image_to_text_accuracy"], logged["text_to_image_accuracy"]) == (0, 0)


def products(fn, *args):
    """How many matrix products the program of a value and its gradient writes down."""
    return str(jax.make_jaxpr(jax.value_and_grad(fn))(*args)).count("dot_general")


def test_ranking_costs_no_product():
    assert products(lambda x: total(config.Softmax(), rows=Rows(x, Y))[0], X) == products(
        lambda x: losses.clip_loss(x, Y, SCALE), X
    )
    _, logged = total(config.Alignment(), config.Uniformity(), config.MultiPositive(), config.Cyclip())
    assert logged.keys() == {"alignment_loss", "uniformity_loss", "multi_positive_loss", "cyclip_loss"}
