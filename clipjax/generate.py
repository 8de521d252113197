"""Captions from a CoCa: the likeliest word after word, drawn by chance, or by beam search; from left to right, each token once.

Keys and values of what is written are kept, those of a picture made once. All is one compiled loop of static shape, over the
mesh's batch axes, that ends when every caption has. Letters: b pictures, n captions side by side for each, t tokens, v words.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config
from clipjax.config import require
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import BatchedModel, CachedBatches
from clipjax.models.clip import Params, Written, bind
from clipjax.placement import placement
from clipjax.sharding import BATCH, keystr, on_shards, over_rows


@dataclass(frozen=True)
class Greedy:
    """Always the likeliest token."""

    beams = 1
    alpha = 0.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Each token drawn from the model's distribution, of which less likely ones may be cut off first."""

    temperature: float = 1.0  # logits are divided by it: below 1 the likely becomes more so
    top_k: int | None = None  # among so many of the likeliest tokens; None: all
    top_p: float = 1.0  # among the fewest of the likeliest that have this probability together
    seed: int = 0  # with a picture's number it decides its caption, whatever else is in the batch

    beams = 1
    alpha = 0.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive; greedy captions are its limit at 0")
        require(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "must be positive, or None for all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")


@dataclass(frozen=True, kw_only=True)
class Beam:
    """The best caption of several that are written side by side, by log-probability over (number of tokens) ** alpha.

    One that has ended keeps its place among them (Sutskever et al., 1409.3215); one beam alone is greedy.
    """

    beams: int = 4
    alpha: float = 1.0  # 0: the likeliest caption, which favours short ones; 1: the mean over its tokens

    def __post_init__(self) -> None:
        require(self.beams > 0, "beams", self.beams, "must be positive")
        require(self.alpha >= 0, "alpha", self.alpha, "must not be negative")


How = Greedy | Sample | Beam
GREEDY = Greedy()


class Captions(NamedTuple):
    tokens: Int[Array, "b t"]  # start, text, end, padding
    logprob: Float[Array, " b"]  # the model's, of all tokens after the start, the end included


class _State(NamedTuple):
    at: Int[Array, ""]  # the last position that is written
    tokens: Int[Array, "b n t"]
    logprob: Float[Array, "b n"]
    ended: Bool[Array, "b n"]
    so_far: Written


class Captioner(BatchedModel):
    """A CoCa that writes, compiled for a mesh; the weights are an argument, so that training compiles it once."""

    def __init__(
        self,
        model: config.Model,
        mesh: Mesh,
        batch_size: int,
        tokenizer: Tokenizer,
        how: How = GREEDY,
    ) -> None:
        """Raises ConfigError for a model that has no captioning head."""
        super().__init__(model, mesh, batch_size)
        require(model.decoder is not None, "model.decoder", None, "only a model with a captioning head writes captions")
        self.how, self._tokenizer = how, tokenizer
        rows = over_rows(mesh)
        self._write = jax.jit(self._loop, out_shardings=Captions(rows, rows))

    def write(self, params: Params, images: Array, index: Array) -> Captions:
        """Captions of a global batch of pictures, uint8 [b, s, s, 3]. `index`: the number of each in its source, by which noise
        is drawn; -1 for padding, which gets none.
        """
        return self._write(params, images, index)

    def stream(self, params: Params, batches: CachedBatches) -> Iterator[tuple[Captions, dict[str, Array]]]:
        """The captions of one batch with `image` and `index` after another, each with its batch, as global arrays."""
        return self.map_batches(batches, lambda batch: self.write(params, batch["image"], batch["index"]))

    def text(self, tokens: Int[Array, " t"]) -> str:
        return self._tokenizer.decode(tokens)

    def _loop(self, params: Params, images: Array, index: Array) -> Captions:
        how, model, length = self.how, bind(self.model, _light(self.model, params)), self.model.text.length
        pad, end, n = self._tokenizer.pad_id, self._tokenizer.end_id, how.beams
        # Mapped over the devices: left to the compiler, sorting gathers the whole batch on each.
        choose = on_shards(functools.partial(_choose, how, end, length - 2), self.mesh, rows=4, out=(P(BATCH),) * 3)

        def score(state: _State) -> Float[Array, "b n"]:
            """Of captions that have ended."""
            size = jnp.maximum((state.tokens == end).argmax(-1), 1).astype(jnp.float32)
            return jnp.where(state.ended, state.logprob / size**how.alpha, -jnp.inf)

        def unfinished(state: _State) -> Bool[Array, ""]:
            """Whether a caption that is still written can come to be better than those that have ended."""
            hope = jnp.where(state.ended, -jnp.inf, state.logprob) / (length - 1.0) ** how.alpha
            return (hope.max(-1) > score(state).max(-1)).any()

        def more(state: _State) -> _State:
            logits, so_far = step(state.tokens, state.at, state.so_far)
            parent, token, logprob = choose(logits, state.logprob, state.ended, index, state.at)
            if n > 1:
                follow = functools.partial(_follow, parent)
                text, decoder = jax.tree.map(lambda x: follow(x, x.ndim - 5), (so_far.text, so_far.decoder))
                so_far = so_far._replace(text=text, decoder=decoder)
                state = state._replace(tokens=follow(state.tokens), ended=follow(state.ended))
            token = jnp.where(state.ended, pad, token)
            tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.at + 1, axis=2)
            return _State(state.at + 1, tokens, logprob, state.ended | (token == end), so_far)

        step, place = model.writer(), placement(self.mesh, self.model.dtype)
        tokens = jnp.full((len(images), n, length), pad, jnp.int32).at[..., 0].set(self._tokenizer.start_id)
        first = jnp.where(jnp.arange(n) == 0, 0.0, -jnp.inf)  # all are alike until the first has been followed by several
        blank = _State(
            jnp.int32(0),
            tokens,
            jnp.broadcast_to(first, tokens.shape[:2]),
            jnp.broadcast_to(index[:, None] < 0, tokens.shape[:2]),
            self._lie(model.begin(images, n, place)),
        )
        done = jax.lax.while_loop(unfinished, more, blank)
        best = score(done).argmax(-1)[:, None]
        return Captions(_follow(best, done.tokens)[:, 0], _follow(best, done.logprob)[:, 0])

    def _lie(self, so_far: Written) -> Written:
        """Rows over the devices of the batch, heads over `tensor`, as the kernels that make them."""

        def at(*axes: str | tuple[str, ...] | None) -> Callable[[Array], Array]:
            def one(x: Array) -> Array:
                stacked = (None,) * (x.ndim - len(axes))
                return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*stacked, *axes)))

            return one

        text, decoder = jax.tree.map(at(BATCH, None, "tensor", None, None), (so_far.text, so_far.decoder))
        return Written(text, decoder, jax.tree.map(at(BATCH, "tensor", None, None), so_far.picture))


def _light(model: config.Model, params: Params) -> Params:
    """Kernels in the dtype in which they are multiplied: they are read again for every token."""
    dtype = jnp.dtype(model.dtype)

    def one(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if keystr(path).endswith("kernel") else x

    return jax.tree_util.tree_map_with_path(one, params)


def _follow(parent: Int[Array, "b m"], x: Array, lead: int = 0) -> Array:
    """Of each picture's captions x [..., b, n, ...] those with these numbers; so many axes come first."""
    parent = jnp.expand_dims(parent, (*range(lead), *range(lead + 2, x.ndim)))
    return jnp.take_along_axis(x, parent, axis=lead + 1)


def _choose(
    how: How, end: int, last: int, logits: Array, logprob: Array, ended: Array, index: Array, at: Array
) -> tuple[Int[Array, "b n"], Int[Array, "b n"], Float[Array, "b n"]]:
    """The captions that go on, the token that each goes on with, and its log-probability then.

    Words are what has an id up to the end's. After the end nothing more is said; at position `last` there is room for it alone.
    """
    of_end = jnp.arange(end + 1)[None, None] == end
    words = jax.nn.log_softmax(logits)[..., : end + 1]
    words = jnp.where(of_end | (at < last), words, -jnp.inf)
    words = jnp.where(ended[..., None], jnp.where(of_end, 0.0, -jnp.inf), words)
    if isinstance(how, Beam):
        total = logprob[..., None] + words
        rank = jnp.where(ended[..., None] & of_end, jnp.inf, total)
        chosen = jax.lax.top_k(_flat(rank), how.beams)[1]
        parent, token = jnp.divmod(chosen, end + 1)
        return parent, token, jnp.take_along_axis(_flat(total), chosen, axis=1)
    token = words.argmax(-1) if isinstance(how, Greedy) else _draw(how, words[:, 0], index, at)[:, None]
    gained = jnp.take_along_axis(words, token[..., None], axis=2)[..., 0]
    return jnp.zeros_like(token), token, logprob + gained


def _flat(x: Float[Array, "b n v"]) -> Float[Array, "b nv"]:
    return x.reshape(len(x), -1)


def _draw(how: Sample, words: Float[Array, "b v"], index: Int[Array, " b"], at: Array) -> Int[Array, " b"]:
    words, ids = words / how.temperature, None
    if how.top_k is not None or how.top_p < 1:
        words, ids = jax.lax.top_k(words, min(how.top_k or words.shape[-1], words.shape[-1]))
        share = jax.nn.softmax(words)
        words = jnp.where(share.cumsum(-1) - share < how.top_p, words, -jnp.inf)

    def one(words: Float[Array, " v"], number: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(how.seed), number)
        return jax.random.categorical(jax.random.fold_in(key, at), words)

    drawn = jax.vmap(one)(words, jnp.maximum(index, 0))
    return drawn if ids is None else jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]
