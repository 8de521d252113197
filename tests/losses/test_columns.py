"""Reductions over columns that are nobody's own, over equal ids, and over several ids; and the next row of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.losses.batch import following
from clipjax.losses.pairwise import pairwise_logsumexp
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

ROWS, CLASSES, WIDTH, SCALE = 16, 24, 8, 14.3
RNG = np.random.default_rng(0)
X, W = (np.float64(np.float32(ref.unit_rows(RNG.normal(size=(n, WIDTH))))) for n in (ROWS, CLASSES))
LABELS, NUMBERS = RNG.integers(-1, CLASSES, (ROWS, 3)), np.arange(CLASSES)
GROUPS = np.stack([np.arange(ROWS) % 5, np.arange(ROWS) % 3 + 5], 1)
LABELS[5] = GROUPS[3] = -1  # none
WEIGHTS = RNG.normal(size=ROWS), RNG.normal(size=CLASSES)
OWN = np.eye(ROWS, dtype=bool)


def equal(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    rows, cols = rows.reshape(len(rows), 1, -1, 1), cols.reshape(1, len(cols), 1, -1)
    return ((rows == cols) & (rows >= 0)).any((2, 3))


def dense(x, y, mask) -> list[np.ndarray]:
    return [ref.logsumexp(SCALE * x @ y.T, mask, axis) for axis in (1, 0)]


def check(shape, y, ids, masks, columns=True, **kw) -> None:
    """Every mask at once: log-sum-exps, and the gradients of a weighted sum of them without the infinite ones."""

    def reduced(x, y, *ids):
        def lse(keep):
            given = None if keep == "all" else ids
            options = dict(axis=axis_of(shape), columns=columns, **kw)
            found = pairwise_logsumexp(x, y, SCALE, keep=keep, ids=given, **options)
            return [found.rows, found.cols] if columns else [found.rows]

        return [lse(keep) for keep in masks]

    def loss(x, y):
        found = [zip(dense(x, y, mask)[: 1 + columns], WEIGHTS, strict=False) for mask in masks.values()]
        return sum((np.where(np.isneginf(s.real), 0, s) * w[: len(s)]).sum() for sides in found for s, w in sides)

    want = [dense(X, y, mask)[: 1 + columns] for mask in masks.values()]
    cots = [[w[: len(s)] * ~np.isneginf(s) for s, w in zip(sides, WEIGHTS, strict=False)] for sides in want]
    out, grads = pulled(reduced, shape)(
        [jnp.float32(X), jnp.float32(y)], jax.tree.map(jnp.float32, cots), jax.tree.map(jnp.int32, ids)
    )
    for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=2e-6)
    for got, wanted in zip(grads, ref.gradients(loss, X, y), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (None, dict(tile=5)),
        ((4, 1), dict(travel="ring", tile=3)),
        ((8, 1), dict(travel="gather", tile=4, columns=False)),
        ((2, 2, 1, 2), dict(travel="ring", tile=1000, columns=False)),
    ],
)
def test_columns_that_are_nobodys_own(shape, options):
    """Class vectors, of another number than the rows: all, those of none of a row's labels, and those of its labels."""
    same = equal(LABELS, NUMBERS)
    check(shape, W, (LABELS, NUMBERS), {"all": np.True_, "distinct": ~same, "same": same}, own=False, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [(None, dict(tile=7)), ((4, 1), dict(travel="gather", tile=3)), ((8, 1), dict(travel="ring", tile=1000))],
)
def test_groups_of_rows(shape, options):
    """Neither the rows of a row's groups nor all others have its own pair among them, even where it has no group."""
    same = equal(GROUPS, GROUPS)
    check(shape, W[:ROWS], (GROUPS, GROUPS), {"same": same & ~OWN, "distinct": ~same & ~OWN}, **options)


def test_own_pairs_and_none_of_them_do_not_go_together():
    with pytest.raises(ValueError, match="off_diagonal"):
        pairwise_logsumexp(jnp.ones((4, 3)), jnp.ones((6, 3)), 1.0, keep="off_diagonal", own=False)


@pytest.mark.parametrize("shape", [None, (1, 1), (4, 2)])
def test_the_following_row(shape):
    x, ct = RNG.normal(size=(2, ROWS, 3))
    out, (grad,) = pulled(lambda x: following(x, axis_of(shape)), shape)([jnp.float32(x)], jnp.float32(ct))
    np.testing.assert_array_equal(out, np.float32(np.roll(x, -1, 0)))
    np.testing.assert_array_equal(grad, np.float32(np.roll(ct, 1, 0)))
