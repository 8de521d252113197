"""Attention by Pallas kernels, on TPUs in training: a sequence's scores never leave the chip's vector memory.

A program has all tokens of one example, so it needs no running softmax, and of a head's scores nothing is kept for the backward
pass. Scores are held as [keys, queries]: sums over keys add whole registers, and of the backward pass's five products three have
a head's width at the side that the matrix unit need not pad. Heads that share a register's 128 lanes are told apart by zeros.

Letters: b batch, t tokens, e width of all heads, w of one head, l lanes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from clipjax import config
from clipjax.models.facts import round_up

LANES, SUBLANES = 128, 8  # of a register of 32-bit numbers; a matrix unit holds 128 x 128 weights
FEW_SCORES, MOST_SCORES = 2**20, 2**21  # of a program, of one that can't have fewer: the compiler unrolls it
MEMORY = 48 * 2**20  # bytes of vector memory that a program may take
# XLA knows of a kernel's cost what it is told. Besides padded products, in FLOPs that a matrix unit could do meanwhile: v5e's
# compiler schedules 3,058 and 6,252 cycles for 196 tokens in 12 heads of 64, of which the products need 1,949 and 4,648 on four
# units (LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"; *final_bundles.txt), 2**17 FLOPs a cycle. These
# two say 3,468 and 6,804.
FLOPS_OF_SCORE = {False: 256, True: 384}  # of the backward kernel?
FLOPS_OF_PROGRAM = 300 * 2**17

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_times = functools.partial(_dot, dimension_numbers=(((1,), (0,)), ((), ())))  # x y
_times_transposed = functools.partial(_dot, dimension_numbers=(((1,), (1,)), ((), ())))  # x y^T


def check(model: config.Model, device: Any, tensor: int) -> None:
    """Raises ConfigError where the model asks for these kernels, and there is none for the device, the dtype or mesh.tensor."""
    if model.attention != "pallas":
        return
    kind = device.device_kind
    remedy = f"its kernels are for TPUs from v4 on, and these devices are of kind {kind}: use exact"
    config.require(device.platform == "tpu" and kind not in ("TPU v2", "TPU v3"), "model.attention", "pallas", remedy)
    config.require(model.dtype == "bfloat16", "model.dtype", model.dtype, "model.attention = pallas needs bfloat16; or use exact")
    remedy = "model.attention = pallas needs 1, because the compiler can't divide a kernel; or use exact"
    config.require(tensor == 1, "mesh.tensor", tensor, remedy)


def lanes(tokens: int, width: int, heads: int) -> int:
    """How much of the width a program takes: whole heads and whole registers. 0: there is no kernel for such a sequence."""
    own = width // heads
    least = math.lcm(own, LANES)
    if own % SUBLANES or width % least:
        return 0
    scores, count = least // own * tokens * round_up(tokens, LANES), width // least
    groups = [n for n in range(1, count + 1) if count % n == 0 and n * scores <= (MOST_SCORES if n == 1 else FEW_SCORES)]
    return max(groups, default=0) * least


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(qkv: Float[Array, "3 b t e"], bias: Float[Array, "3 e"], heads: int, causal: bool) -> Float[Array, "b t e"]:
    """Scaled dot-product attention of queries, keys and values, `bias` added to each, where `lanes` is not 0.

    Scores and softmax are float32. The bias is added here, so that its gradient need not be summed up from what is written.
    """
    return _attend(qkv, bias, heads, causal)[0]


def _attend(qkv: Array, bias: Array, heads: int, causal: bool) -> tuple[Array, Array]:
    qkv = qkv + bias[:, None, None]
    _, b, t, e = qkv.shape
    [y] = _run(_forward, heads, causal, [((b, t, e), qkv.dtype)], qkv)
    return y, qkv


def _gradients(heads: int, causal: bool, qkv: Array, dy: Array) -> tuple[Array, Array]:
    shapes = [(qkv.shape, qkv.dtype), ((dy.shape[0], 3, dy.shape[2]), jnp.float32)]
    dqkv, dbias = _run(_backward, heads, causal, shapes, qkv, dy)
    return dqkv, dbias.sum(0).astype(qkv.dtype)


attend.defvjp(_attend, _gradients)


@jax.named_scope("attention")
def _run(kernel: Callable[..., None], heads: int, causal: bool, outs: list[tuple[Any, Any]], *args: Array) -> list[Array]:
    """Runs a kernel. Its grid: examples, parts of the width."""
    _, b, t, e = args[0].shape
    part = lanes(t, e, heads)

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        if len(shape) == 4:
            return pl.BlockSpec((3, None, t, part), lambda i, j: (0, i, 0, j))
        return pl.BlockSpec((None, shape[1], part), lambda i, j: (i, 0, j))

    return pl.pallas_call(
        functools.partial(kernel, width=e // heads, causal=causal),
        grid=(b, e // part),
        in_specs=[block(x.shape) for x in args],
        out_specs=[block(shape) for shape, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(*out, manual_axis_type=jax.typeof(args[-1]).mat) for out in outs],
        cost_estimate=pl.CostEstimate(flops=_flops(b, t, e, heads, kernel is _backward), transcendentals=0, bytes_accessed=0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY),
        name=f"attention{kernel.__name__}",
    )(*args)


def _forward(qkv: Any, out: Any, *, width: int, causal: bool) -> None:
    """Refs: qkv [3, t, e], out [t, e]."""
    y = _Tiles(out)
    for heads in _at_once(qkv, width):
        weights = [_weights(qkv, *head, causal) for head in heads]
        values = [_rows(qkv[2, :, tile], own) for tile, own in heads]
        for (w, r), v in zip(weights, values, strict=True):
            y.add(_times(v, w.astype(v.dtype)) * r)


def _backward(qkv: Any, dy: Any, dqkv: Any, dbias: Any, *, width: int, causal: bool) -> None:
    """Refs: qkv and dqkv [3, t, e], dy [t, e], dbias [3, e]."""
    dtype, scale = qkv.dtype, width**-0.5
    tiles = [_Tiles(dqkv.at[i], dbias, i) for i in range(3)]
    for heads in _at_once(qkv, width):
        weights = [w * r for w, r in (_weights(qkv, *head, causal) for head in heads)]
        slopes = [_times_transposed(qkv[2, :, tile], _own(dy[:, tile], own)) for tile, own in heads]
        slopes = [(w * (s - (w * s).sum(0, keepdims=True))).astype(dtype) for w, s in zip(weights, slopes, strict=True)]
        for (tile, own), w, s in zip(heads, weights, slopes, strict=True):
            query, key, above = (_rows(x, own) for x in (qkv[0, :, tile] * scale, qkv[1, :, tile], dy[:, tile]))
            tiles[0].add(_times(key, s) * scale)
            tiles[1].add(_times_transposed(query.astype(dtype), s))
            tiles[2].add(_times_transposed(above, w.astype(dtype)))


Head = tuple[slice, slice]  # the registers' lanes that hold a head's, of all; its own lanes of these


def _at_once(qkv: Any, width: int) -> list[tuple[Head, ...]]:
    """The heads of a program, those together whose chains of operations the compiler should interleave."""
    _, t, e = qkv.shape
    heads = []
    for first in range(0, e, width):
        start, end = first // LANES * LANES, round_up(first + width, LANES)
        heads.append((slice(start, end), slice(first - start, first - start + width)))
    count = max(1, 8 * LANES // round_up(t, LANES))
    return [tuple(heads[i : i + count]) for i in range(0, len(heads), count)]


def _weights(qkv: Any, tile: slice, own: slice, causal: bool) -> tuple[Float[Array, "t t"], Float[Array, "1 t"]]:
    """A head's attention weights [keys, queries], and what each query's are to be multiplied by so that they sum to 1."""
    query = _own(qkv[0, :, tile] * (own.stop - own.start) ** -0.5, own)
    scores = _times_transposed(qkv[1, :, tile], query.astype(qkv.dtype))
    if causal:
        key, at = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(key <= at, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(0, keepdims=True))
    return weights, 1 / weights.sum(0, keepdims=True)


def _own(x: Float[Array, "t l"], own: slice) -> Float[Array, "t l"]:
    """x with zeros in the lanes of other heads: a product over all lanes is then one over the head's."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return x if own.stop - own.start == x.shape[1] else jnp.where((own.start <= lane) & (lane < own.stop), x, 0)


def _rows(x: Float[Array, "t l"], own: slice) -> Float[Array, "w t"]:
    """A head's lanes as rows."""
    return x.T[own]


class _Tiles:
    """Writes heads' results, which come as rows [w, t], to a ref [t, e], and each column's sum to row `i` of a ref [3, e]."""

    def __init__(self, ref: Any, sums: Any = None, i: int = 0) -> None:
        self.ref, self.sums, self.i, self.rows, self.at = ref, sums, i, [], 0

    def add(self, rows: Float[Array, "w t"]) -> None:
        self.rows = [jnp.concatenate([*self.rows, rows])]
        while self.rows and len(self.rows[0]) >= LANES:
            [x], here = self.rows, slice(self.at, self.at + LANES)
            y = x[:LANES].astype(self.ref.dtype).T
            self.ref[:, here] = y
            if self.sums is not None:
                self.sums[self.i, here] = y.astype(jnp.float32).sum(0)
            self.rows, self.at = [x[LANES:]] if len(x) > LANES else [], self.at + LANES


def _flops(b: int, tokens: int, width: int, heads: int, backward: bool) -> int:
    """What a kernel keeps the matrix units busy for, padding and vector work included."""
    own, rows, columns = width // heads, round_up(tokens, SUBLANES), round_up(tokens, LANES)
    spans = sum(round_up(i * own + own, LANES) - i * own // LANES * LANES for i in range(heads))
    wide, narrow = 2 * rows * columns * spans, 2 * heads * own * columns**2  # over a head's width, and where it is a result's
    products = 2 * wide + 3 * narrow if backward else wide + narrow
    programs = b * (width // lanes(tokens, width, heads))
    return b * (products + heads * FLOPS_OF_SCORE[backward] * rows * columns) + FLOPS_OF_PROGRAM * programs
