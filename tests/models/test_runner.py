"""In how many chunks a tower runs a batch, and that chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.models.runner import Placement, Runner, chunk_count

ROWS, TOKENS = 7, 16  # of a device; of an example


@pytest.mark.parametrize(
    ("rows", "most", "count"),
    [(128, 20, 8), (120, 20, 6), (1, 20, 1), (20, 20, 1), (5, 1, 5), (11, 3, 4)] + [(n, 20, 7) for n in (122, 126, 127, 131)],
)
def test_few_chunks_whatever_the_number_of_rows(rows, most, count):
    """127 is a prime: not 127 chunks of a row, but seven of 19, of which six rows are copies."""
    assert chunk_count(rows, most) == count
    assert -(-rows // count) <= most


@pytest.mark.parametrize("devices", [1, 2])
def test_rows_that_no_chunks_divide(devices):
    """Values and gradients are those of the rows alone. A mask that is empty in the copies would give NaN."""
    run, count = Runner("full", part=3 * TOKENS, placement=Placement(devices)), devices * ROWS
    x, w = np.random.default_rng(0).standard_normal((count, 3)), np.float32([1, 2, 3])
    x, keys = jnp.float32(x), jax.random.split(jax.random.key(0), count)

    def direct(w, x, keys):
        noise = jax.vmap(jax.random.normal)(keys)
        return jnp.log(jnp.square(x * w[None]).sum(1)) * noise

    def chunked(w, x, keys):
        chunks = run.to_chunks(x, TOKENS), run.to_chunks(keys, TOKENS)
        assert chunks[0].shape == (3, 3 * devices, 3)
        return run.from_chunks(run.map_chunks(lambda *chunk: direct(w, *chunk), *chunks), count)

    for got, want in zip(*(jax.vjp(lambda *a, f=f: f(*a, keys), w, x) for f in (chunked, direct)), strict=True):
        if callable(got):
            got, want = (pull(jnp.arange(count, dtype=jnp.float32)) for pull in (got, want))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
