"""The references are tested themselves: golden values of the fixture, closed forms, and every gradient in a second way."""

import numpy as np
import pytest

from tests.losses import reference as ref

T = 1 / 0.07
XR, YR = ref.fixture(4, 3)
X, Y = ref.unit_rows(XR), ref.unit_rows(YR)
IDS = np.array([0, 0, 1, 2])


def off_diagonal(s):
    return s[~np.eye(len(s), dtype=bool)]


GOLDEN = {
    "clip": (lambda: ref.clip(X, Y, T), 1.1495012874),
    "clip image to text": (lambda: ref.clip(X, Y, T, image_weight=1), 1.5901644267),
    "clip text to image": (lambda: ref.clip(X, Y, T, image_weight=0), 0.7088381481),
    "clip at 100": (lambda: ref.clip(X, Y, 100), 7.567003924),
    "label smoothing": (lambda: ref.clip(X, Y, T, label_smoothing=0.1), 2.1110661316),
    "ALIGN": (lambda: 2 * ref.clip(X, Y, T, label_smoothing=0.1), 4.2221322631),
    "ConVIRT": (lambda: ref.clip(X, Y, 10, image_weight=0.75), 0.9923463077),
    "DCL": (lambda: ref.decoupled(X, Y, T), -4.2813193086),
    "DCLW": (lambda: ref.decoupled(X, Y, T, sigma=0.5), -3.8109636013),
    "SigLIP": (lambda: ref.siglip(X, Y, 10, -10), 2.8876405536),
    "uniformity of X": (lambda: ref.uniformity(X), -2.4259557058),
    "uniformity of Y": (lambda: ref.uniformity(Y), -1.9719213025),
    "cross-uniformity": (lambda: ref.cross_uniformity(X, Y), -2.304389325),
    "alignment": (lambda: ref.alignment(X, Y), 0.5246340799),
    "hard negatives": (lambda: ref.hard_negative(X, Y, T), 1.4578010873),
    "hard negatives, beta 0": (lambda: ref.hard_negative(X, Y, T, beta=0), 1.1495012874),
    "hard negatives, decoupled": (lambda: ref.hard_negative(X, Y, T, alpha=0), -3.4407783935),
    "CWCL": (lambda: ref.cwcl(X, Y, T), 5.9759854962),
    "several positives": (lambda: ref.multi_positive(X, Y, T, IDS, IDS), 3.1210531089),
    "Matryoshka, 2": (lambda: ref.matryoshka(ref.clip, XR, YR, (2,), T), 2.3481363113),
    "Matryoshka, 2 and 3": (lambda: ref.matryoshka(ref.clip, XR, YR, (2, 3), T), 3.4976375987),
    "CyCLIP in-modal": (lambda: ref.cyclip(X, Y)[0], 1.0922946383),
    "CyCLIP cross-modal": (lambda: ref.cyclip(X, Y)[1], 0.5565736625),
}


def test_golden_values():
    np.testing.assert_allclose(X[0], [0.88805959, 0.14893321, 0.4349357], atol=5e-9)
    np.testing.assert_allclose(Y[0], [0.43791423, -0.25186739, 0.86301445], atol=5e-9)
    for name, (value, want) in GOLDEN.items():
        assert value() == pytest.approx(want, abs=6e-11), name


def test_golden_gradients():
    dx, dy, dt = ref.gradients(ref.clip, X, Y, T)
    np.testing.assert_allclose(dx[1], [-2.0854527090, 1.1492779479, -0.0263070516], atol=6e-11)
    np.testing.assert_allclose(dy[0], [-0.0087120001, -0.0002880305, -0.0028049791], atol=6e-11)
    assert dt * T == pytest.approx(1.0138823817, abs=6e-11)
    _, _, dt, db = ref.gradients(ref.siglip, X, Y, 10, -10)
    assert (dt, db) == (pytest.approx(-0.5401312475, abs=6e-11), pytest.approx(-0.7799599778, abs=6e-11))


def test_golden_moving_average():
    g1, g2 = (np.exp(g) for g in ref.log_inner(X, Y, T, T))
    np.testing.assert_allclose(g1, [1.4375167222e-3, 1.8986384808e2, 1.1641197115e-8, 3.2425949415e-3], rtol=1e-9)
    np.testing.assert_allclose(g2, [2.4512254485e-4, 1.8302290137e-1, 1.3216750858e-4, 3.3284668069], rtol=1e-9)

    def total_of(x, y):
        return sum(g.mean() for g in ref.log_inner(x, y, T, T)) / T / 2

    assert total_of(X, Y) == pytest.approx(-0.3765952118, abs=6e-11)
    assert ref.decoupled(X, Y, T) == pytest.approx(total_of(X, Y) * T + np.log(3), abs=1e-12)
    zeros = np.zeros(4), np.zeros(4)
    surrogate = ref.gradients(lambda x, y: ref.sogclr_surrogate(x, y, T, T, zeros, 1.0), X, Y)
    for got, want in zip(surrogate, ref.gradients(total_of, X, Y), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    kept = ref.moved(np.log([0.5, 2.0]), np.log([3.0, 1.0]), 0.25)
    np.testing.assert_allclose(np.exp(kept), [0.75 * 0.5 + 0.25 * 3, 0.75 * 2 + 0.25], rtol=1e-14)


def test_the_larger_fixture():
    x, y = (ref.unit_rows(z) for z in ref.fixture(64, 16))
    got = (ref.clip(x, y, T), ref.clip(x, y, 100), ref.siglip(x, y, 10, -10), ref.uniformity(x), ref.uniformity(y))
    want = (0.09090551604803836, 0.031232094642624997, 2.0865084092372848, -3.640678872044303, -3.6191786745848917)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(ref.cross_uniformity(x, y), -3.614247799017325, rtol=1e-13)
    np.testing.assert_allclose(ref.alignment(x, y), 0.3767886513816, rtol=1e-12)


def test_closed_forms():
    n = 64
    same, eye, ids = np.eye(n)[np.zeros(n, int)], np.eye(n), np.arange(n)
    for t in (1.0, T, 100.0):
        assert ref.clip(same, same, t) == pytest.approx(np.log(n), rel=1e-14)
        assert ref.decoupled(same, same, t) == pytest.approx(np.log(n - 1), rel=1e-14)
        assert ref.clip(eye, eye, t) == pytest.approx(np.log1p((n - 1) * np.exp(-t)), abs=1e-13)
    assert ref.siglip(same, same, 10, -10) == pytest.approx(n * np.log(2), rel=1e-14)
    zero = np.concatenate([eye, 0 * eye], 1), np.concatenate([0 * eye, eye], 1)
    assert ref.siglip(*zero, 10, -10) == pytest.approx(np.logaddexp(0, 10) + (n - 1) * np.logaddexp(0, -10), rel=1e-14)
    assert ref.gradients(lambda b: ref.siglip(*zero, 10, b), -np.log(n - 1))[0] == pytest.approx(0, abs=1e-14)
    assert ref.clip(*zero, T, label_smoothing=0.1) == pytest.approx(np.log(n), rel=1e-14)
    triangle = np.stack([np.cos(2 * np.pi / 3 * np.arange(3)), np.sin(2 * np.pi / 3 * np.arange(3))], 1)
    assert ref.uniformity(triangle) == pytest.approx(-6, rel=1e-14)
    simplex = ref.unit_rows(eye - 1 / n)
    assert ref.uniformity(simplex) == pytest.approx(-4 * n / (n - 1), rel=1e-14)
    assert ref.uniformity(same) == 0
    assert ref.cross_uniformity(same, -same) == pytest.approx(-8, rel=1e-14)
    assert ref.multi_positive(X, Y, T, ids[:4], ids[:4]) == pytest.approx(ref.clip(X, Y, T), rel=1e-14)
    twice = [np.concatenate([z, z]) for z in (X, Y)]
    assert ref.multi_positive(*twice, T, *[np.tile(ids[:4], 2)] * 2) == pytest.approx(ref.clip(X, Y, T) + np.log(2), rel=1e-14)
    assert ref.cwcl(X, Y, T, weights=np.eye(4)) == pytest.approx(2 * ref.clip(X, Y, T), rel=1e-14)
    x, y = ref.separated(8)
    np.testing.assert_allclose(x @ y.T, np.where(np.eye(8), 0.3, -0.3), atol=1e-7)
    np.testing.assert_allclose([(x * x).sum(1), (y * y).sum(1)], 1, atol=1e-7)


def test_second_ways():
    s = T * X @ Y.T
    g = (ref.softmax(s, axis=1) + ref.softmax(s, axis=0)) / 8 - np.eye(4) / 4
    want = T * g @ Y, T * g.T @ X, (g * s).sum() / T
    for got, w in zip(ref.gradients(ref.clip, X, Y, T), want, strict=True):
        np.testing.assert_allclose(got, w, atol=1e-13)
    np.testing.assert_allclose(ref.by_logit(ref.clip, X, Y, T), g, atol=1e-13)
    smooth = 0.9 * ref.clip(X, Y, T) + 0.1 / 32 * sum((ref.logsumexp(z)[:, None] - z).sum() for z in (s, s.T))
    assert ref.clip(X, Y, T, label_smoothing=0.1) == pytest.approx(smooth, rel=1e-14)
    logits = 10 * X @ Y.T - 10
    assert ref.siglip(X, Y, 10, -10) == pytest.approx((np.logaddexp(0, logits).sum() - np.trace(logits)) / 4, rel=1e-14)

    def hard(s):
        off = ~np.eye(4, dtype=bool)
        gap = ref.logsumexp(1.25 * s, off) - ref.logsumexp(0.25 * s, off) + np.log(3)
        return (np.logaddexp(np.diag(s), gap) - np.diag(s)).mean()

    assert ref.hard_negative(X, Y, T) == pytest.approx((hard(s) + hard(s.T)) / 2, rel=1e-14)
    for z in (X, Y):
        assert ref.uniformity(z) == pytest.approx(-4 + np.log(np.exp(4 * off_diagonal(z @ z.T)).mean()), rel=1e-14)
    assert ref.cross_uniformity(X, Y) == pytest.approx(-4 + np.log(np.exp(4 * off_diagonal(X @ Y.T)).mean()), rel=1e-14)
    xx, yy, xy = X.T @ X, Y.T @ Y, X.T @ Y
    grams = (xx**2).sum() + (yy**2).sum() - 2 * (xy**2).sum(), 2 * (xx * yy).sum() - 2 * np.trace(xy @ xy)
    np.testing.assert_allclose(ref.cyclip(X, Y), np.array(grams) / 4, rtol=1e-13)
    assert ref.distillation(X, Y, T, np.eye(4), np.eye(4), 1e4) == pytest.approx(ref.clip(X, Y, T), rel=1e-14)


def test_stop_gradients_hold_the_weights():
    w = 2 - 4 * ref.softmax((X * Y).sum(1) / 0.5)
    for kw in (dict(sigma=0.5), dict(sigma=0.5, stop_gradient=True)):
        dt = ref.gradients(lambda t, kw=kw: ref.decoupled(X, Y, t, **kw), T)[0]
        cos, off = X @ Y.T, ~np.eye(4, dtype=bool)
        mean = [(ref.softmax(T * c, off) * c).sum(1) - w * np.diag(c) for c in (cos, cos.T)]
        assert dt == pytest.approx(np.mean(mean), rel=1e-12)  # no scale in the weights, so both agree
    free, held = (ref.gradients(lambda x, s=s: ref.decoupled(x, Y, T, sigma=0.5, stop_gradient=s), X)[0] for s in (False, True))
    assert np.abs(free - held).max() > 0.1
    free, held = (ref.gradients(lambda t, s=s: ref.hard_negative(X, Y, t, stop_gradient=s), T)[0] for s in (False, True))
    assert abs(free - held) > 1e-3
    same = np.eye(4)[np.zeros(4, int)]
    assert ref.hard_negative(same, same, T) == pytest.approx(np.log(4), rel=1e-14)


def test_ids_leave_out_pairs_and_empty_rows_count_as_zero():
    ids = np.array([0, 0, 0, 0])
    for fn in (ref.clip, ref.decoupled, ref.hard_negative):
        assert fn(X, Y, T, ids=ids) == 0
        assert np.array_equal(ref.gradients(lambda t, fn=fn: fn(X, Y, t, ids=ids), T)[0], 0)
        assert fn(X, Y, T, ids=np.arange(4)) == pytest.approx(fn(X, Y, T), rel=1e-14)
    ids = np.array([0, 0, 1, 2])
    s = T * X @ Y.T
    row0 = np.log(np.exp(s[0, [0, 2, 3]]).sum()) - s[0, 0]  # by hand: pair (0, 1) is gone
    first = ref.clip(X, Y, T, ids=ids, image_weight=1) * 4
    others = [np.log(np.exp(s[i, k]).sum()) - s[i, i] for i, k in ((1, [1, 2, 3]), (2, slice(None)), (3, slice(None)))]
    assert first == pytest.approx(row0 + sum(others), rel=1e-13)
    assert ref.hard_negative(X, Y, T, beta=0, ids=ids) == pytest.approx(ref.clip(X, Y, T, ids=ids), rel=1e-13)
    pair = ref.pairwise_softplus(X, Y, 10, -10) - ref.pairwise_softplus(X, Y, 10, -10, (ids, ids))
    assert pair == pytest.approx(np.logaddexp(0, 10 * X[0] @ Y[1] - 10) + np.logaddexp(0, 10 * X[1] @ Y[0] - 10), rel=1e-12)


def test_temperatures_follow_the_average():
    """iSogCLR's gradient of tau (2305.11965) is that of tau log g where u is g. For any other u it is no function's gradient."""
    zeros, b = (np.zeros(4), np.zeros(4)), 4
    taus = np.linspace(0.05, 0.2, b), np.linspace(0.3, 0.1, b)
    got, terms = ref.by_temperature(X, Y, 1 / taus[0], 1 / taus[1], zeros, 1.0)

    def total_of(t1, t2):
        return sum((t * g).mean() for t, g in zip((t1, t2), ref.log_inner(X, Y, 1 / t1, 1 / t2), strict=True)) / 2

    for g, want, most in zip(got, ref.gradients(total_of, *taus), terms, strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-12)
        assert np.all(np.abs(g) <= most)
    assert ref.sogclr(X, Y, T, T, zeros, 1.0)[0] == pytest.approx(-0.3765952118, abs=6e-11)
    first = ref.sogclr(X, Y, T, T, [z - np.inf for z in zeros], 0.1)  # on the first visit there is nothing to keep
    assert first[0] == pytest.approx(-0.3765952118, abs=6e-11)


@pytest.mark.parametrize("keep", ["all", "off_diagonal", "distinct"])
def test_primitives_gradients_have_a_second_way(keep):
    rng = np.random.default_rng(1)
    x, y = ref.random_pairs(5, 3, texts=2)
    ids = np.array([0, 0, 1, 2, 3]), np.array([0, 1, 0, 2, 1, 1, 2, 3, 3, 3])
    r, c = rng.uniform(1, 20, 5), rng.uniform(1, 20, 10)
    cot = {k: rng.normal(size=5 if k.startswith("row") else 10) for k in ("rows", "cols", "row_positive", "col_positive")}

    def total(*args):
        out = ref.pairwise_logsumexp(*args, keep, ids)
        return sum((w * np.where(np.isneginf(out[k].real), 0, out[k])).sum() for k, w in cot.items())

    pulled = ref.pull_logsumexp(x, y, r, c, cot, keep, ids)
    for got, want in zip(pulled[:4], ref.gradients(total, x, y, r, c), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    pulled = ref.pull_logsumexp(x, y, 7.0, 3.0, cot, keep, ids)
    for got, want in zip(pulled[:4], ref.gradients(total, x, y, 7.0, 3.0), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.all(pulled.row_terms >= np.abs(pulled.row_scale))


def test_other_primitives_gradients_have_a_second_way():
    rng = np.random.default_rng(1)
    x, y = ref.random_pairs(5, 3)
    tx, ty = ref.random_pairs(5, 6, seed=1)
    ids = np.array([0, 0, 1, 2, 2])
    for ids2 in (None, (ids, ids)):
        pulled = ref.pull_softplus(x, y, 7.0, -3.0, ids2)
        wants = ref.gradients(lambda *a, i=ids2: ref.pairwise_softplus(*a, i), x, y, 7.0, -3.0)
        for got, want in zip(pulled[:4], wants, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)
    u, v = rng.normal(size=5), rng.normal(size=5)

    def total(x, y, t):
        rows, cols = ref.pairwise_cross_entropy(x, y, t, tx, ty, 5.0)
        return (u * rows).sum() + (v * cols).sum()

    pulled = ref.pull_cross_entropy(x, y, 7.0, tx, ty, 5.0, u, v)
    for got, want in zip(pulled[:3], ref.gradients(total, x, y, 7.0), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_the_complex_step_is_a_derivative():
    """Once against plain differences, lest every reference share one mistake."""
    fn = lambda t: ref.hard_negative(X, Y, t) + ref.matryoshka(ref.clip, XR, YR, (2, 3), t) + ref.uniformity(X, t / 10)  # noqa: E731
    assert ref.gradients(fn, T)[0] == pytest.approx((fn(T + 1e-5) - fn(T - 1e-5)) / 2e-5, rel=1e-7)
