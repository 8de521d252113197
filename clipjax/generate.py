"""Captions from a CoCa, token by token: greedy, sampled, or by beam search.

Keys and values of generated tokens are cached; those of an image are computed once. It is one compiled loop of static shape over
the mesh's batch axes; it ends when every caption has ended. Letters: b images, n captions at a time for each, t tokens, v words.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config
from clipjax.config import require
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import BatchedModel, CachedBatches
from clipjax.models.clip import CLIP, CaptionCache, DecodeStep, Params, bind
from clipjax.placement import cast_kernels, make_placement
from clipjax.sharding import BATCH, on_shards, over_rows


@dataclass(frozen=True)
class Greedy:
    """Takes the most likely token at every position."""

    beams = 1
    alpha = 0.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws each token from the model's distribution, which may be restricted to the most likely tokens."""

    temperature: float = 1.0  # logits are divided by it: below 1, likely tokens become more likely
    top_k: int | None = None  # only this number of the most likely tokens; None: all
    top_p: float = 1.0  # only the fewest most likely tokens whose probabilities sum to this
    seed: int = 0  # with the image's number it determines the caption, whatever else is in the batch

    beams = 1
    alpha = 0.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive; greedy captions are its limit at 0")
        require(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "must be positive, or None for all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Keeps several captions at a time and returns the best, by log-probability / (number of tokens) ** alpha.

    A caption that has ended stays among them (Sutskever et al., 1409.3215). One beam is greedy.
    """

    beams: int = 4
    alpha: float = 1.0  # 0: by log-probability, which favours short captions; 1: by its mean over tokens

    def __post_init__(self) -> None:
        require(self.beams > 0, "beams", self.beams, "must be positive")
        require(self.alpha >= 0, "alpha", self.alpha, "must not be negative")


Decoding = Greedy | Sample | Beam
GREEDY = Greedy()


class Captions(NamedTuple):
    tokens: Int[Array, "b t"]  # start, text, end, padding
    logprob: Float[Array, " b"]  # the model's, of all tokens after the start, the end included


class _State(NamedTuple):
    at: Int[Array, ""]  # the last position that has a token
    tokens: Int[Array, "b n t"]
    logprob: Float[Array, "b n"]
    ended: Bool[Array, "b n"]
    cache: CaptionCache


class Captioner(BatchedModel):
    """Generates captions with a CoCa, compiled for a mesh. The weights are an argument, so that training compiles it once."""

    def __init__(
        self,
        model: config.Model,
        mesh: Mesh,
        batch_size: int,
        tokenizer: Tokenizer,
        decoding: Decoding = GREEDY,
    ) -> None:
        """Raises ConfigError for a model that has no captioning head."""
        super().__init__(model, mesh, batch_size)
        require(model.decoder is not None, "model.decoder", None, "only a model with a captioning head generates captions")
        self.decoding, self._tokenizer = decoding, tokenizer
        rows: Any = over_rows(mesh)
        self._jitted = jax.jit(self._generate, out_shardings=Captions(rows, rows))
        choose = _Choose(decoding, tokenizer.end_id, model.text.length - 2)
        # In a shard_map: left to the compiler, sorting gathers the global batch on every device.
        self._choose = on_shards(choose, mesh, rows=4, out=(P(BATCH),) * 3)

    def generate(self, params: Params, images: Array, index: Array) -> Captions:
        """Captions of a global batch of images, uint8 [b, s, s, 3]. `index`: the number of each in its source, which determines
        its random draws; -1 for padding, whose captions are empty.
        """
        return self._jitted(params, images, index)

    def stream(self, params: Params, batches: CachedBatches) -> Iterator[tuple[Captions, dict[str, Array]]]:
        """The captions of one batch after another, each with its batch, as global arrays. A batch has `image` and `index`."""
        return self.map_batches(batches, lambda batch: self.generate(params, batch["image"], batch["index"]))

    def _generate(self, params: Params, images: Array, index: Array) -> Captions:
        model = bind(self.model, cast_kernels(params, self.model.dtype))  # once: the loop reads the kernels for every token
        extend = functools.partial(self._extend, model.decode_step(), index)
        done = jax.lax.while_loop(self._unfinished, extend, self._start(model, images, index))
        best = self._score(done).argmax(-1)[:, None]
        return Captions(_follow(best, done.tokens)[:, 0], _follow(best, done.logprob)[:, 0])

    def _start(self, model: CLIP, images: Array, index: Array) -> _State:
        n, shape = self.decoding.beams, (len(images), self.decoding.beams, self.model.text.length)
        tokens = jnp.full(shape, self._tokenizer.pad_id, jnp.int32).at[..., 0].set(self._tokenizer.start_id)
        first = jnp.where(jnp.arange(n) == 0, 0.0, -jnp.inf)  # all beams are equal until the first has branched
        return _State(
            jnp.int32(0),
            tokens,
            jnp.broadcast_to(first, shape[:2]),
            jnp.broadcast_to(index[:, None] < 0, shape[:2]),
            self._constrain(model.start_captions(images, n, make_placement(self.mesh, self.model.dtype))),
        )

    def _score(self, state: _State) -> Float[Array, "b n"]:
        """The score of captions that have ended; -inf for others."""
        size = jnp.maximum((state.tokens == self._tokenizer.end_id).argmax(-1), 1).astype(jnp.float32)
        return jnp.where(state.ended, state.logprob / size**self.decoding.alpha, -jnp.inf)

    def _unfinished(self, state: _State) -> Bool[Array, ""]:
        """Whether a caption that has not ended can still get a better score than those that have."""
        bound = jnp.where(state.ended, -jnp.inf, state.logprob) / (self.model.text.length - 1.0) ** self.decoding.alpha
        return (bound.max(-1) > self._score(state).max(-1)).any()

    def _extend(self, step: DecodeStep, index: Array, state: _State) -> _State:
        """Every caption with one more token."""
        logits, cache = step(state.tokens, state.at, state.cache)
        parent, token, logprob = self._choose(logits, state.logprob, state.ended, index, state.at)
        if self.decoding.beams > 1:
            follow = functools.partial(_follow, parent)
            text, decoder = jax.tree.map(lambda x: follow(x, x.ndim - 5), (cache.text, cache.decoder))
            cache = cache._replace(text=text, decoder=decoder)
            state = state._replace(tokens=follow(state.tokens), ended=follow(state.ended))
        token = jnp.where(state.ended, self._tokenizer.pad_id, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.at + 1, axis=2)
        return _State(state.at + 1, tokens, logprob, state.ended | (token == self._tokenizer.end_id), cache)

    def _constrain(self, cache: CaptionCache) -> CaptionCache:
        """The cache with its rows sharded as the batch and its heads over `tensor`, as the kernels that compute it."""

        def shard(*axes: str | tuple[str, ...] | None) -> Callable[[Array], Array]:
            return lambda x: jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, P(*(None,) * (x.ndim - len(axes)), *axes))
            )

        text, decoder = jax.tree.map(shard(BATCH, None, "tensor", None, None), (cache.text, cache.decoder))
        return CaptionCache(text, decoder, jax.tree.map(shard(BATCH, "tensor", None, None), cache.image))


def _follow(parent: Int[Array, "b m"], x: Array, lead: int = 0) -> Array:
    """From x [..., b, n, ...], with n captions of each image: those with the numbers `parent`. `lead` axes come before b."""
    parent = jnp.expand_dims(parent, (*range(lead), *range(lead + 2, x.ndim)))
    return jnp.take_along_axis(x, parent, axis=lead + 1)


@dataclass(frozen=True)
class _Choose:
    """Chooses the next token of each caption."""

    decoding: Decoding
    end: int  # id of the end token
    last: int  # the position after which only the end token may come

    def __call__(
        self, logits: Float[Array, "b n v"], logprob: Array, ended: Array, index: Array, at: Array
    ) -> tuple[Int[Array, "b n"], Int[Array, "b n"], Float[Array, "b n"]]:
        """The captions that continue, the next token of each, and their log-probability with it.

        Ids up to the end token's are words. Only padding follows an end token. After position `last` only the end token may come.
        """
        is_end = jnp.arange(self.end + 1)[None, None] == self.end
        words = jax.nn.log_softmax(logits)[..., : self.end + 1]
        words = jnp.where(is_end | (at < self.last), words, -jnp.inf)
        words = jnp.where(ended[..., None], jnp.where(is_end, 0.0, -jnp.inf), words)
        if isinstance(self.decoding, Beam):
            total = logprob[..., None] + words
            rank = jnp.where(ended[..., None] & is_end, jnp.inf, total)
            chosen = jax.lax.top_k(_flat(rank), self.decoding.beams)[1]
            parent, token = jnp.divmod(chosen, self.end + 1)
            return parent, token, jnp.take_along_axis(_flat(total), chosen, axis=1)
        if isinstance(self.decoding, Sample):
            token = _draw(self.decoding, words[:, 0], index, at)[:, None]
        else:
            token = words.argmax(-1)
        gained = jnp.take_along_axis(words, token[..., None], axis=2)[..., 0]
        return jnp.zeros_like(token), token, logprob + gained


def _flat(x: Float[Array, "b n v"]) -> Float[Array, "b nv"]:
    return x.reshape(len(x), -1)


def _draw(sample: Sample, words: Float[Array, "b v"], index: Int[Array, " b"], at: Array) -> Int[Array, " b"]:
    """One id from each row of log-probabilities."""
    words, ids = words / sample.temperature, None
    if sample.top_k is not None or sample.top_p < 1:
        words, ids = jax.lax.top_k(words, min(sample.top_k or words.shape[-1], words.shape[-1]))
        share = jax.nn.softmax(words)
        words = jnp.where(share.cumsum(-1) - share < sample.top_p, words, -jnp.inf)

    def draw(words: Float[Array, " v"], number: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(sample.seed), number)
        return jax.random.categorical(jax.random.fold_in(key, at), words)

    drawn = jax.vmap(draw)(words, jnp.maximum(index, 0))
    return drawn if ids is None else jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]
