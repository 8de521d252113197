"""The primitives against float64, value and every gradient under random cotangents: meshes, ways to travel, tiles, geometries."""

import functools
import itertools
import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.losses.pairwise import pairwise_cross_entropy, pairwise_logsumexp, pairwise_softplus
from tests.losses import reference as ref
from tests.losses.meshes import Shape, Way, axis_of, pulled

SCALES = (1.0, 14.3, 100.0)
ROWS, WIDTH = 24, 49  # 3 rows on each of 8 devices; wide enough for the geometry that needs an axis for each row, and more


class Route(NamedTuple):
    shape: Shape
    travel: str | None
    tile: int
    way: Way = "outside"

    def keywords(self) -> dict:
        return dict(axis=axis_of(self.shape), travel=self.travel, tile=self.tile)


class Request(NamedTuple):
    keep: str = "all"
    texts: int = 1  # K
    ids: bool = False
    scales: str = "shared"  # one number, one for each side, or one for each row and column
    columns: bool = True


# Each mesh; both ways to travel; tiles that divide, that don't, of one row and larger than all rows; each way to differentiate.
QUICK = [
    (Route(None, None, 1000), Request("off_diagonal")),
    (Route(None, None, 7), Request("distinct", texts=2, ids=True, scales="rows")),
    (Route((1, 1), "ring", 5, "inside"), Request("distinct", ids=True)),
    (Route((2, 1), "gather", 5, "outside, unchecked"), Request("all", texts=3, ids=True, scales="rows")),
    (Route((4, 1), "ring", 4, "outside, unchecked"), Request("off_diagonal", ids=True, scales="sides")),
    (Route((4, 1), "gather", 1000, "inside"), Request("off_diagonal", scales="rows", columns=False)),
    (Route((8, 1), "ring", 2, "inside"), Request("distinct", texts=2, ids=True, scales="rows")),
    (Route((8, 1), "gather", 4), Request("distinct", ids=True, scales="sides")),
    (Route((2, 4), "ring", 3), Request("all", texts=2)),
    (Route((2, 4), None, 1, "inside"), Request("all", ids=True, scales="rows")),
    (Route((2, 2, 2, 1), "ring", 4, "inside"), Request("distinct", texts=2, ids=True, scales="rows")),  # slices: rings of rings
    (Route((1, 2, 1, 4), "gather", 5, "inside"), Request("distinct", ids=True, scales="rows")),  # 4 share 12 columns of a device
    (Route((2, 2, 1, 2), "ring", 2), Request("off_diagonal", texts=3, scales="sides")),  # both
]
MESHES = [None, (1, 1), (2, 1), (4, 1), (8, 1), (2, 4), (4, 2, 1, 1), (1, 1, 2, 4), (2, 1, 2, 2)]
WAYS = [("ring", "outside"), ("gather", "outside, unchecked"), ("ring", "inside")]
WHATS = [
    Request("all"),
    Request("off_diagonal", scales="rows"),
    Request("all", texts=2, ids=True, scales="sides"),
    Request("off_diagonal", texts=3, ids=True),
    Request("distinct", texts=3, ids=True, scales="rows"),
    Request("distinct", ids=True, columns=False),
]


def sweep(tiles: int) -> list[tuple[int, Route]]:
    """Every mesh with every way, and with `tiles` of three tiles; the number beside it runs so that whatever goes by it, modulo
    up to 6, meets every mesh and every way.
    """
    found = []
    for m, shape in enumerate(MESHES):
        for w, (travel, way) in enumerate(WAYS if shape else [(None, "outside")]):
            for t in range(3) if shape is None else range(tiles):
                found.append((3 * t + w + m, Route(shape, travel, (1, 5, 1000)[(t + w + m) % 3], way)))
    return found


def name(value) -> str:
    return "-".join(str(v).replace(" ", "") for v in value)


@functools.cache
def geometries(rows: int, texts: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Random ones, positives at .3 with negatives at -.3 (a wide contrastive gap), and all rows equal. All are of one width."""
    width = 2 * rows + 1
    far = ref.separated(rows)
    same = np.eye(width)[np.zeros(rows, int)]
    return (
        tuple(np.pad(z, ((0, 0), (0, width - 8))) for z in ref.random_pairs(rows, 8, texts=texts)),
        (far[0], np.repeat(far[1], texts, 0)),
        (same, np.repeat(same, texts, 0)),
    )


def some_ids(rows: int, texts: int, geometry: int) -> tuple[np.ndarray, np.ndarray]:
    """Of images and texts, equal within a pair: many equal ones anywhere; one for all, so nothing is kept; or full tiles."""
    ids = np.random.default_rng(0).integers(0, rows // 3, rows)
    ids = (ids, 0 * ids, np.sort(ids))[geometry]
    text_ids = np.repeat(ids, texts)
    others = np.arange(len(text_ids)) % texts != 0  # the further texts of an image may have another id
    return ids, np.where(others & (np.arange(len(text_ids)) % 5 == 0), text_ids[::-1], text_ids)


def close(got, want, scale: float, what: str) -> None:
    """An array to 1e-5 of its largest entry, 5e-5 at scale 100; infinities in the same places."""
    got, want = np.float64(got), np.asarray(want)
    some = np.isfinite(want)
    np.testing.assert_array_equal(got[~some], want[~some], what)
    rtol = 5e-5 if scale == 100 else 1e-5
    atol = rtol * max(np.abs(want[some]).max(initial=0), 1e-6)
    np.testing.assert_allclose(got[some], want[some], rtol=0, atol=atol, err_msg=what)


def cotangents_of(fields: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {field: np.float64(np.float32(rng.normal(size=n))) for field, n in fields.items()}


def check_logsumexp(route: Route, what: Request, rows: int) -> None:
    n, c = rows, rows * what.texts
    fields = {"rows": n, "cols": c} | ({"row_positive": n, "col_positive": c} if what.ids else {})
    if not what.columns:
        fields = {k: v for k, v in fields.items() if k.startswith("row")}
    cot = cotangents_of(fields, zlib.crc32(repr((route, what)).encode()))
    full = cotangents_of({"rows": n, "cols": c, "row_positive": n, "col_positive": c}, 0)
    full = {k: cot.get(k, 0 * v) for k, v in full.items()}
    maxima = ("row_max", "col_max") if what.columns else ("row_max",)

    def reduced(x, y, row, col, x_ids, y_ids):
        ids = (x_ids, y_ids) if what.ids else None
        out = pairwise_logsumexp(x, y, row, col, keep=what.keep, ids=ids, columns=what.columns, **route.keywords())
        assert what.columns or (out.cols, out.col_max, out.col_positive) == (None, None, None)
        assert what.ids or (out.row_positive, out.col_positive) == (None, None)
        return [getattr(out, k) for k in (*fields, *maxima)]

    run = pulled(
        lambda x, y, row, col, x_ids, y_ids: reduced(x, y, row, None if what.scales == "shared" else col, x_ids, y_ids),
        route.shape,
        route.way,
    )
    for scale, (geometry, (x, y)) in itertools.product(SCALES, enumerate(geometries(rows, what.texts))):
        pair = some_ids(rows, what.texts, geometry)
        ids = pair if what.ids else None
        row, col = np.float32(scale), np.float32(scale if what.scales == "shared" else scale / 2)
        if what.scales == "rows":
            rng = np.random.default_rng(1)
            row, col = (np.float32(scale * rng.uniform(0.3, 1, k)) for k in (n, c))
        zeros = [np.zeros(n if k == "row_max" else c) for k in maxima]
        args = [jnp.float32(a) for a in (x, y, row, col)]
        out, grads = run(args, [jnp.float32(w) for w in (*cot.values(), *zeros)], [jnp.int32(i) for i in pair])
        row, col = np.float64(row), np.float64(col)
        want = ref.pairwise_logsumexp(x, y, row, col, what.keep, ids)
        for k, value in zip((*fields, *maxima), out, strict=True):
            close(value, want[k], scale, k)
        pull = ref.pull_logsumexp(x, y, row, col, full, what.keep, ids)
        close(grads[0], pull.x, scale, "x")
        close(grads[1], pull.y, scale, "y")
        if what.scales == "shared":
            assert abs(grads[2] - pull.row_scale - pull.col_scale) <= 1e-5 * (pull.row_terms + pull.col_terms) + 1e-30
            continue
        for got, wanted, terms in ((grads[2], pull.row_scale, pull.row_terms), (grads[3], pull.col_scale, pull.col_terms)):
            rtol = 1e-5 if what.scales == "sides" or scale < 100 else 5e-5
            assert np.all(np.abs(got - wanted) <= rtol * np.max(terms) + 1e-30), np.abs(got - wanted).max() / np.max(terms)


@pytest.mark.optimized
@pytest.mark.parametrize(("route", "what"), QUICK, ids=name)
def test_logsumexp(route, what):
    check_logsumexp(route, what, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(("route", "what"), [(route, WHATS[n % len(WHATS)]) for n, route in sweep(3)], ids=name)
def test_logsumexp_everywhere(route, what):
    check_logsumexp(route, what, 48)


def check_softplus(route: Route, rows: int, *, with_ids: bool) -> None:

    def summed(x, y, scale, bias, ids):
        return pairwise_softplus(x, y, scale, bias, ids=(ids, ids) if with_ids else None, **route.keywords())

    run = pulled(summed, route.shape, route.way)
    for scale, bias, (geometry, (x, y)) in itertools.product(SCALES, (-10.0, 2.0), enumerate(geometries(rows, 1))):
        given = some_ids(rows, 1, geometry)
        pair = given if with_ids else None
        others = ref.kept(ref.own_pairs(rows, rows), "distinct" if with_ids else "off_diagonal", pair)
        scale, ct = float(np.float32(scale)), 0.7 / rows
        args = [jnp.float32(a) for a in (x, y, scale, bias)]
        zeros = jnp.zeros(rows)
        (total, row_max, col_max), grads = run(args, (jnp.float32(ct), zeros, zeros), (jnp.int32(given[0]),))
        want = ref.pairwise_softplus(x, y, scale, bias, pair)
        assert abs(total - want) <= 1e-5 * max(abs(want), 1e-2)
        cos = np.where(others, x @ y.T, -np.inf)
        close(row_max, cos.max(1), 1, "row_max")
        close(col_max, cos.max(0), 1, "col_max")
        dx, dy, d_scale, d_bias, scale_terms, bias_terms = (ct * a for a in ref.pull_softplus(x, y, scale, bias, pair))
        close(grads[0], dx, scale, "x")
        close(grads[1], dy, scale, "y")
        assert abs(grads[2] - d_scale) <= 1e-5 * scale_terms
        assert abs(grads[3] - d_bias) <= 1e-5 * bias_terms


@pytest.mark.optimized
@pytest.mark.parametrize(("route", "with_ids"), [(QUICK[i][0], i < 5) for i in (1, 4, 6, 9)])
def test_softplus(route, with_ids):
    check_softplus(route, ROWS, with_ids=with_ids)


@pytest.mark.slow
@pytest.mark.parametrize(("route", "with_ids"), [(route, n % 2 == 0) for n, route in sweep(1)])
def test_softplus_everywhere(route, with_ids):
    check_softplus(route, 48, with_ids=with_ids)


def check_cross_entropy(route: Route, rows: int) -> None:
    tx, ty = ref.random_pairs(rows, 12, seed=5)
    cot = cotangents_of({"rows": rows, "cols": rows}, 3)

    def entropies(x, y, scale, tx, ty, teacher_scale):
        return pairwise_cross_entropy(x, y, scale, tx, ty, teacher_scale, **route.keywords())

    run = pulled(entropies, route.shape, route.way)
    for scale, teacher, (x, y) in itertools.product(SCALES, (1.0, 50.0), geometries(rows, 1)):
        scale = float(np.float32(scale))
        args = tuple(jnp.float32(a) for a in (x, y, scale, tx, ty, teacher))
        out, grads = run(args, tuple(jnp.float32(w) for w in cot.values()))
        for got, want in zip(out, ref.pairwise_cross_entropy(x, y, scale, tx, ty, teacher), strict=True):
            close(got, want, scale, "value")
        dx, dy, d_scale, terms = ref.pull_cross_entropy(x, y, scale, tx, ty, teacher, *cot.values())
        close(grads[0], dx, scale, "x")
        close(grads[1], dy, scale, "y")
        assert abs(grads[2] - d_scale) <= 1e-5 * max(terms, 1e-6)
        assert all(not np.any(g) for g in grads[3:])  # none to the teacher


@pytest.mark.optimized
@pytest.mark.parametrize("route", [h for h, _ in (QUICK[1], QUICK[6], QUICK[7])], ids=name)
def test_cross_entropy(route):
    check_cross_entropy(route, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("route", [route for _, route in sweep(1)], ids=name)
def test_cross_entropy_everywhere(route):
    check_cross_entropy(route, 48)


def test_cross_entropy_keeps_the_digits_of_a_small_gradient():
    """Where the student and the teacher find nearly all own pairs, and each is about as sure as the other."""
    rng = np.random.default_rng(0)
    near, scale, teacher = rng.normal(size=(ROWS, 12)), 100.0, 20.0
    vectors = [np.float64(np.float32(ref.unit_rows(near + 0.1 * rng.normal(size=near.shape)))) for _ in range(4)]
    ones = np.ones(ROWS)

    def sums(x, y, tx, ty):
        return [side.sum() for side in pairwise_cross_entropy(x, y, scale, tx, ty, teacher)]

    _, grads = pulled(sums, None)(list(map(jnp.float32, vectors)), [jnp.float32(1)] * 2)
    want = ref.pull_cross_entropy(*vectors[:2], scale, *vectors[2:], teacher, ones, ones)
    for z, g, w in zip(vectors[:2], grads[:2], want[:2], strict=True):
        assert 1e-9 < np.abs(w).max() / scale < 0.05
        w = ref.tangent(w, z)
        np.testing.assert_allclose(ref.tangent(g, z), w, rtol=0, atol=1e-5 * np.abs(w).max())


def test_a_vector_that_is_no_number_shows():
    """In its own row, whatever is left out of it and however it travels; and nowhere does it pass for an empty row."""
    x, y = (jnp.float32(z) for z in ref.random_pairs(ROWS, 8))
    ids = jnp.int32(some_ids(ROWS, 1, 0)[0])

    def rows(x, y, ids):
        kw = dict(axis=axis_of((2, 1)), tile=5, travel="ring")
        out = pairwise_logsumexp(x, y, 14.3, keep="distinct", ids=(ids, ids), **kw)
        total, *_ = pairwise_softplus(x, y, 14.3, -10.0, ids=(ids, ids), **kw)
        entropy, _ = pairwise_cross_entropy(x, y, 14.3, jnp.ones_like(x), jnp.ones_like(y), 1.0, **kw)
        return out.rows, out.cols, entropy, total

    zeros = (jnp.zeros(ROWS),) * 3 + (jnp.float32(0),)
    run = pulled(rows, (2, 1))
    for bad in (np.nan, np.inf, -np.inf):
        for first, second in ((x.at[3, 0].set(bad), y), (x, y.at[17, 0].set(bad))):
            (row, col, entropy, total), _ = run((first, second), zeros, (ids,))
            assert not np.isfinite(np.concatenate([row, col])).all()
            assert not np.isneginf(np.concatenate([row, col])).any()
            assert not np.isfinite(np.sum(entropy))
            assert not np.isfinite(total)


def test_bfloat16_operands_keep_three_digits():
    x, y = ref.random_pairs(48, 128)
    y = np.float64(np.float32(ref.unit_rows(y + 2 * ref.random_pairs(48, 128, seed=1)[1])))  # not so near that the loss is small
    own = (x * y).sum(1)

    def loss(dtype, x, y, scale):
        out = pairwise_logsumexp(x, y, scale, axis=axis_of((4, 1)), dtype=dtype, tile=5)
        return out.rows, out.cols

    cot = (np.full(48, 1 / 96),) * 2
    runs = {dtype: pulled(functools.partial(loss, dtype), (4, 1)) for dtype in (jnp.float32, jnp.bfloat16)}
    for scale in (1.0, 14.3):
        args = tuple(jnp.float32(a) for a in (x, y, scale))
        want = ref.clip(x, y, scale)
        pull = ref.pull_logsumexp(x, y, scale, scale, dict(zip(("rows", "cols"), cot, strict=True)))
        values = {}
        for dtype in runs:
            out, grads = runs[dtype](args, tuple(jnp.float32(w) for w in cot))
            values[dtype] = np.mean(np.float64(out)) - scale * own.mean()
            for got, wanted in zip(grads[:2], (pull.x, pull.y), strict=True):
                atol = (1e-5 if dtype == jnp.float32 else 1e-2) * np.abs(wanted).max()
                np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)
        assert abs(values[jnp.float32] - want) <= 1e-5 * want
        assert abs(values[jnp.bfloat16] - want) <= 1e-3 * want
        assert values[jnp.bfloat16] != values[jnp.float32]


def test_what_cannot_be_is_refused():
    x, y = jnp.ones((4, 3)), jnp.ones((6, 3))
    with pytest.raises(ValueError, match="multiple"):
        pairwise_logsumexp(x, y, 1.0)
    with pytest.raises(ValueError, match="col_scale"):
        pairwise_logsumexp(x, x, jnp.ones(4))
    with pytest.raises(ValueError, match="ids"):
        pairwise_logsumexp(x, x, 1.0, keep="distinct")
