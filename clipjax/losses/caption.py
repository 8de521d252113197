"""The cross-entropy of the tokens of captions. The logits [tokens, vocabulary] are never in memory.

A tile of logits is computed, reduced and dropped. The backward pass computes it again and takes both gradients from it. The
products cost 8 n v d FLOPs; with a stored matrix they would cost 6 n v d. Letters: n tokens, v words of the vocabulary, d width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax.losses.batch import einsum
from clipjax.losses.pairwise.axes import Axis, vary, varying_axes
from clipjax.losses.pairwise.partials import finite

TILE = (4096, 4096)  # tokens and words: 64 MiB of logits, and many multiply-adds for each number that is read


def caption_loss(nll: Float[Array, " b"], tokens: Int[Array, " b"], *, axis: Axis = None) -> Float[Array, ""]:
    """Mean over the real tokens of the global batch of -log p (CoCa, 2205.01917, equation 2).

    `nll`: the sum of -log p over each caption's tokens; `tokens`: their number. The mean of the devices' means would differ: a
    token would weigh more on a device that has fewer.
    """
    sums = nll.sum(), tokens.sum().astype(jnp.float32)
    total, count = sums if axis is None else jax.lax.psum(sums, axis)
    return total / jnp.maximum(count, 1)


def token_nll(
    states: Float[Array, "n d"],
    table: Float[Array, "v d"],
    targets: Int[Array, " n"],
    *,
    axis: Axis = None,
    columns: str | None = None,
    tile: tuple[int, int] = TILE,
) -> Float[Array, " n"]:
    """-log softmax(states @ table.T)[target], float32. `states`: the decoder's outputs; `targets`: the next token's id.

    Inside `shard_map`, `axis` names the mesh axes over which the vocabulary is sharded: `table` is this device's shard, in the
    axes' order; states and targets are the same on all of them, and targets are ids of the full vocabulary. Over any other axis
    each device has tokens of its own. `columns` names one of these, of n devices, over which the table's width is sharded, with
    zeros after d columns if n does not divide d: a tile of words is gathered when it is needed, and its gradient is scattered.
    Operands are multiplied in the dtype of `states`; sums are float32.
    """
    sizes = _tile_size(len(states), tile[0]), _tile_size(len(table), tile[1])
    first = 0 if axis is None else jax.lax.axis_index(axis) * len(table)
    return _token_nll(states, table, targets - first, axis, columns, sizes)


@jax.named_scope("loss")
def caption_nll(
    states: Float[Array, "n t-1 d"],
    table: Float[Array, "v d"],
    tokens: Int[Array, "n t"],
    lengths: Int[Array, " n"],
    of_tokens: Callable[[Array, Array, Array], Array] = token_nll,
) -> Float[Array, " n"]:
    """The sum of -log p over each caption's real tokens but the first, from the states of all tokens but the last.

    `lengths`: how many tokens are real. `of_tokens`: `token_nll`, or a function that runs it on each device's shard.
    """
    targets = tokens[:, 1:]
    nll = of_tokens(states.reshape(-1, states.shape[-1]), table, targets.reshape(-1)).reshape(targets.shape)
    real = jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]
    return jnp.where(real, nll, 0).sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_nll(
    states: Array, table: Array, targets: Array, axis: Axis, columns: str | None, tile: tuple[int, int]
) -> Float[Array, " n"]:
    return _forward(states, table, targets, axis, columns, tile)[0]


def _forward(
    states: Array, table: Array, targets: Array, axis: Axis, columns: str | None, tile: tuple[int, int]
) -> tuple[Array, Any]:
    axes = _varying(states, table, targets)

    def tokens(found: tuple[Array, ...], r: Array) -> tuple[tuple[Array, ...], None]:
        at, _ = _place(r, len(states), tile[0])
        h, y = _take(states, at, tile[0]), _take(targets, at, tile[0])
        sums = _over_words(h, y, table, columns, tile[1], axes)
        return tuple(jax.lax.dynamic_update_slice(x, part, (at,)) for x, part in zip(found, sums, strict=True)), None

    start = vary((jnp.zeros(len(states), jnp.float32),) * 3, axes)
    (top, total, own), _ = jax.lax.scan(tokens, start, _numbers(len(states), tile[0]))
    if axis is not None:
        m = jax.lax.pmax(top, axis)
        total, own = jax.lax.psum((total * jnp.exp(top - finite(m)), own), axis)
        top = m
    lse = top + jnp.log(total)
    return lse - own, (states, table, targets, lse)


def _over_words(h: Array, y: Array, table: Array, columns: str | None, words: int, axes: tuple[str, ...]) -> tuple[Array, ...]:
    """For a tile of tokens: the largest logit m, the sum of exp(logit - m), and the target's logit, over this shard's words."""

    def add_tile(sums: tuple[Array, ...], c: Array) -> tuple[tuple[Array, ...], None]:
        at, fresh = _place(c, len(table), words)
        logits, hit = _tile(h, y, _words(table, at, words, h, columns), at, fresh)
        top, total, own = sums
        m = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - finite(m)) + jnp.exp(logits - finite(m)[:, None]).sum(-1)
        return (m, total, own + jnp.where(hit, logits, 0).sum(-1)), None

    start = vary(tuple(jnp.full(len(h), x, jnp.float32) for x in (-jnp.inf, 0, 0)), axes)
    return jax.lax.scan(add_tile, start, _numbers(len(table), words))[0]


def _backward(
    axis: Axis, columns: str | None, tile: tuple[int, int], residuals: tuple[Array, ...], ct: Float[Array, " n"]
) -> tuple[Array, Array, None]:
    states, table, targets, lse = residuals
    axes = _varying(states, table, targets, ct)
    replicated = tuple(a for a in axes if a not in _varying(table))  # of the table: its gradient is summed there, tile by tile

    def words(found: tuple[Array, Array], c: Array) -> tuple[tuple[Array, Array], None]:
        at_word, fresh_words = _place(c, len(table), tile[1])
        w = _words(table, at_word, tile[1], states, columns)

        def tokens(found: tuple[Array, Array], r: Array) -> tuple[tuple[Array, Array], None]:
            at, fresh = _place(r, len(states), tile[0])
            h, y, z, weight = (_take(x, at, tile[0]) for x in (states, targets, lse, ct))
            logits, hit = _tile(h, y, w, at_word, fresh_words)
            g = (jnp.exp(logits - z[:, None]) - hit) * jnp.where(fresh, weight, 0)[:, None]
            g = g.astype(h.dtype)
            of_word = found[1] + einsum("nv,nd->vd", g, h, preferred_element_type=jnp.float32)
            of_row = _take(found[0], at, tile[0]) + einsum("nv,vd->nd", g, w, preferred_element_type=jnp.float32)
            return (jax.lax.dynamic_update_slice(found[0], of_row, (at, 0)), of_word), None

        start = found[0], vary(jnp.zeros(w.shape, jnp.float32), axes)
        (of_states, of_words), _ = jax.lax.scan(tokens, start, _numbers(len(states), tile[0]))
        of_words = _own_columns(of_words, table.shape[1], columns)
        # The barrier: without it XLA sums the full table after the loop, in a second loop. The last tile overlaps the one before.
        of_words = jax.lax.optimization_barrier(jax.lax.psum(of_words, replicated)) + _take(found[1], at_word, tile[1])
        return (of_states, jax.lax.dynamic_update_slice(found[1], of_words, (at_word, 0))), None

    start = vary(jnp.zeros(states.shape, jnp.float32), axes), vary(jnp.zeros(table.shape, jnp.float32), _varying(table))
    (of_states, of_table), _ = jax.lax.scan(words, start, _numbers(len(table), tile[1]))
    if axis is not None:
        of_states = jax.lax.psum(of_states, axis)
    return of_states.astype(states.dtype), of_table.astype(table.dtype), None


_token_nll.defvjp(_forward, _backward)


def _tile(h: Array, y: Array, w: Array, at: Array, fresh: Array) -> tuple[Float[Array, "r c"], Array]:
    """The logits of some tokens and the words from number `at` on, and which are the targets'. Words not `fresh` are left out."""
    logits = einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)
    return jnp.where(fresh[None], logits, -jnp.inf), (y[:, None] == at + jnp.arange(len(w))[None]) & fresh[None]


def _words(table: Array, at: Array, count: int, states: Array, columns: str | None) -> Float[Array, "c d"]:
    """Rows of the table, as they are multiplied with the states.

    They are rounded first. If they were only converted, XLA would convert the full table before the loop and keep it.
    """
    info = jnp.finfo(states.dtype)
    rows = jax.lax.reduce_precision(_take(table, at, count), info.nexp, info.nmant).astype(states.dtype)
    return rows if columns is None else jax.lax.all_gather(rows, columns, axis=1, tiled=True)[:, : states.shape[1]]


def _own_columns(of_words: Float[Array, "c d"], width: int, columns: str | None) -> Float[Array, "c w"]:
    """The gradient of a tile of words, summed over the devices that each have `width` columns of it: this device's columns."""
    if columns is None:
        return of_words
    padded = jnp.pad(of_words, ((0, 0), (0, jax.lax.axis_size(columns) * width - of_words.shape[1])))
    return jax.lax.psum_scatter(padded, columns, scatter_dimension=1, tiled=True)


def _tile_size(length: int, most: int) -> int:
    """The size of equal tiles: at most `most`, a multiple of 128, and such that the last tile overlaps little."""
    even = -(-length // -(-length // most))
    return min(length, most, -(-even // 128) * 128)


def _place(i: Array, length: int, size: int) -> tuple[Array, Array]:
    """Where the i-th tile starts, and which of its members no earlier tile has. The last tile ends where the array ends."""
    at = jnp.minimum(i * size, length - size)
    return at, at + jnp.arange(size) >= i * size


def _take(x: Array, at: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, at, size)


def _numbers(length: int, size: int) -> Any:
    """The numbers of all tiles, as a constant of the program."""
    return np.arange(-(-length // size))


def _varying(*arrays: Array) -> tuple[str, ...]:
    """The mesh axes over which any of them differs, by shard_map's own check."""
    return tuple(sorted(varying_axes(*arrays)))
