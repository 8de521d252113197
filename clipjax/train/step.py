"""One optimisation step: (state, batch) -> (state, metrics). A pure function: it touches no file and no clock."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax import config, losses, placement, sharding
from clipjax.models import clip
from clipjax.models.heads import TowerOutput
from clipjax.models.text import lengths
from clipjax.train import accumulate, memory, nonfinite
from clipjax.train.memory import Memory
from clipjax.train.optimizer import clamp_scale, ema_update, next_rate, stop_frozen
from clipjax.train.state import TrainState, weight_specs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# A Batch, with a random key of each example (`keys`) and its stored values (`memory`, see train/memory.py).
StepInputs = dict[str, Any]


class Encoded(NamedTuple):
    """What the towers make of the rows of a batch."""

    image: TowerOutput  # [b, e], or [b, V, e] of several views
    text: TowerOutput  # [b, e], or [b, K, e] of several captions
    nll: jax.Array | None = None  # with a captioning loss: -log p [b] of each image's captions, given its first view

    @property
    def heads(self) -> dict[str, losses.HeadRows]:
        """The vectors of the heads, by name."""
        found = (self.image.heads, self.text.heads, self.image.predicted, self.text.predicted)
        return {name: losses.HeadRows(*(of_side.get(name) for of_side in found)) for name in found[0] | found[1]}


class Trainable(NamedTuple):
    """What the loss is differentiated with respect to."""

    params: clip.Params
    temperatures: Memory  # of the batch's examples


def example_keys(seed: int, name: str, step: jax.Array, index: jax.Array) -> jax.Array:
    """A random key for each example, from its index [b] in the dataset. Mesh, processes and micro-batches do not change it."""
    return jax.vmap(functools.partial(jax.random.fold_in, step_key(seed, name, step)))(index)


def step_key(seed: int, name: str, step: jax.Array) -> jax.Array:
    """A random key of a step, for the use of this name."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)


def make_train_step(
    run: config.Run, tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Binds everything static; the caller jits. A batch holds `image` uint8 [B, s, s, 3], `text` [B, t] or [B, K, t], `index`
    int32 [B] in the dataset, and what the objective's terms need: `id` int32 [B], `teacher_image` and `teacher_text` [B, f].
    With data.embeddings, `embedded` float32 [B, e] stands for a tower that does not run.

    The metrics are float32 []: the loss and its parts; scale and bias; the learning rate; the norms of the gradient before it is
    clipped, of the update (both over the trained parameters), and of all parameters. With train.nonfinite = skip,
    `nonfinite.count` adds two, and a step that is not finite changes nothing of the state but its two counts.
    """
    replicated: Any = P()
    towers = placement.towers(mesh, run.model.dtype, Trainable(weight_specs(run, mesh), replicated))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = example_keys(run.seed, "patch_dropout", state.step, batch["index"])
        past = memory.read(state.memory, batch["index"]) if state.memory else {}
        trainable = Trainable(state.params, memory.temperatures(past))
        key = step_key(run.seed, "objective", state.step) if any(term.draws for term in run.objective) else None
        encode, loss_of = functools.partial(_encode, run, towers), functools.partial(_loss, run, mesh, key)
        value_and_grad = accumulate.value_and_grad(
            encode, loss_of, mesh, towers, run.train.micro_batches, lambda x: x._replace(params=clip.without_classes(x.params))
        )
        (loss, (logged, remembered)), gradient = value_and_grad(trainable, batch | {"keys": keys, "memory": past})
        updates, opt_state = tx.update(gradient.params, state.opt_state, state.params)
        params = clamp_scale(optax.apply_updates(state.params, updates), run.model.max_scale)
        choose = nonfinite.choice(run.train.nonfinite, loss, gradient.params)
        params, opt_state = choose((params, opt_state), (state.params, state.opt_state))
        decay = run.optim.ema
        if state.ema is None or decay is None:
            ema = None
        else:
            ema = choose(ema_update(state.ema, clip.without_classes(params), decay, nonfinite.updates(state)), state.ema)
        norms = {"grad_norm": gradient.params, "param_norm": params, "update_norm": updates}
        scalars = {"scale": jnp.exp(params["log_scale"])} | ({"bias": params["bias"]} if "bias" in params else {})
        own = {name: head["log_scale"] for name, head in params.get("heads", {}).items() if "log_scale" in head}
        scalars |= {f"{name}_scale": jnp.exp(log_scale) for name, log_scale in own.items()}
        if (rate := next_rate(run.optim, run.train.steps, state.opt_state)) is not None:
            scalars["lr"] = rate
        metrics = {"loss": loss} | logged | scalars | {name: optax.tree.norm(tree) for name, tree in norms.items()}
        if remembered:
            rows = choose(memory.learn(run, remembered, gradient.temperatures), past)
            remembered = memory.write(state.memory, batch["index"], rows)
        in_row, counts = nonfinite.count(state, opt_state, choose)
        return TrainState(state.step + 1, params, opt_state, ema, remembered, in_row), metrics | counts

    return train_step


def _encode(run: config.Run, towers: placement.Towers, trainable: Trainable, rows: StepInputs) -> Encoded:
    """The vectors of images and texts, and -log p of the captions where a term asks for it."""
    model = clip.bind(run.model, stop_frozen(run.optim_in_use.rules, trainable.params), run.model.attention)
    *captions, length = rows["text"].shape
    tokens = rows["text"].reshape(-1, length)
    if run.embedded == "image":
        return Encoded(TowerOutput(rows["embedded"]), _by_example(captions, model.vectors("text", tokens, towers.placement)))
    views, images, keys = _views(rows)
    if run.embedded == "text":
        return Encoded(_by_example(views, model.vectors("image", images, towers.placement, keys)), TowerOutput(rows["embedded"]))
    if not run.captioning:
        text = model.vectors("text", tokens, towers.placement)
        return Encoded(_by_example(views, model.vectors("image", images, towers.placement, keys)), _by_example(captions, text))
    parallel_share, parallel = run.model.decoder.parallel if run.model.decoder else 0, None
    if parallel_share:
        parallel = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), parallel_share))(rows["keys"])
    image, text, states = model.encode_pairs(images, tokens, keys, parallel, towers.placement, run.data.views_per_image)
    nll = losses.caption_nll(states, model.words, tokens, lengths(tokens), towers.token_nll)
    return Encoded(_by_example(views, image), _by_example(captions, text), _of_captions(run, nll.reshape(captions[0], -1)))


def _by_example(shape: list[int], vectors: TowerOutput) -> TowerOutput:
    """Vectors [b K, e] -> [b, e] or [b, K, e]. `shape`: b, and K where an example has several."""
    return jax.tree.map(lambda x: x.reshape(*shape, -1), vectors)


def _views(rows: StepInputs) -> tuple[list[int], jax.Array, jax.Array]:
    """b, and V where there are several, all views [b V, s, s, 3], those of an image one after the other, and a key for each."""
    images, keys = rows["image"], rows["keys"]
    *views, height, width, channels = images.shape
    if len(views) > 1:
        of_views = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(of_views, (0, None))(keys, 2 + jnp.arange(views[1])).reshape(-1)  # 1 is that of `parallel`
        images = images.reshape(-1, height, width, channels)
    return views, images, keys


def _of_captions(run: config.Run, numbers: jax.Array) -> jax.Array:
    """Sums [b] over each example's captions, of numbers [b, K] of its texts: a decoder does not learn changed copies."""
    copies = run.data.text_augment.count
    return (numbers[:, :-copies] if copies else numbers).sum(1)


@jax.named_scope("loss")
def _loss(
    run: config.Run, mesh: Mesh, key: jax.Array | None, trainable: Trainable, z: Encoded, rows: StepInputs
) -> tuple[jax.Array, tuple[Metrics, Memory]]:
    """The loss of all embeddings, the values to log, and the values to store for the batch's examples (train/memory.py)."""
    on_shard = functools.partial(losses.objective, run.objective, axis=sharding.BATCH)
    objective = sharding.on_shards(on_shard, mesh, rows=1, out=(P(), P(), P(sharding.BATCH)))
    weights = stop_frozen(run.optim_in_use.rules, trainable.params)
    teacher = (rows["teacher_image"], rows["teacher_text"]) if "teacher_image" in rows else None
    predicted = lengths(rows["text"]).reshape(len(rows["text"]), -1) - 1  # tokens of each caption
    caption = None if z.nll is None else (z.nll, _of_captions(run, predicted))
    past, labels, classes = rows["memory"] | trainable.temperatures, rows.get("label"), weights.get("classes")
    inputs = losses.Rows(z.image.embedding, z.text.embedding, rows.get("id"), teacher, past, caption, z.heads, labels, classes)
    heads = weights.get("heads", {})
    shared = losses.Shared({name: jnp.exp(head["log_scale"]) for name, head in heads.items() if "log_scale" in head}, key)
    loss, logged, remembered = objective(inputs, jnp.exp(weights["log_scale"]), weights.get("bias"), shared)
    return loss, (logged, remembered)


def jit_step(train_step: Callable[..., Any], state: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """The jitted step. It donates the old state, and returns the new one with the same shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows, replicated = sharding.over_rows(mesh), sharding.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, in_shardings=(shardings, rows), out_shardings=(shardings, replicated))
