"""Values that a term of the objective stores for every training example: SogCLR's moving averages, iSogCLR's temperatures.

They are a dict of float32 [n], indexed by the example's position in the dataset. They are sharded over the same devices as the
batch, so n is a multiple of their number, and at least that of the examples; it may change when a run resumes on another mesh.
A batch's rows are read before the loss and written after it; an index appears only once in a batch.
"""

import jax
import jax.numpy as jnp

from clipjax import config
from clipjax.losses.sogclr import UNSEEN
from clipjax.models.facts import round_up

Memory = dict[str, jax.Array]
SIDES = ("image", "text")
MULTIPLE = 1024  # n is the next multiple of it, and then of the devices: so it is the same on any usual mesh
MAX_GRADIENT = 5.0  # a temperature's gradient is clipped to [-5, 5], as in iSogCLR's code (2305.11965)


def term_of(run: config.Run) -> config.Remembering | None:
    """The term that stores values of every example, or None."""
    return next((t for t in run.objective if isinstance(t, config.Remembering) and t.weight), None)


def initial(run: config.Run, devices: int) -> Memory:
    """The values before any example was seen, to be sharded over so many devices."""
    term = term_of(run)
    if term is None:
        return {}
    n = round_up(round_up(term.examples, MULTIPLE), devices)
    values = {f"log_u_{side}": jnp.full(n, UNSEEN) for side in SIDES}
    if isinstance(term, config.Isogclr):
        values |= {f"temperature_{side}": jnp.full(n, term.temperature) for side in SIDES}
        values |= {f"momentum_{side}": jnp.zeros(n) for side in SIDES}
    return values


def read(memory: Memory, index: jax.Array) -> Memory:
    """The values of a batch's examples, [B] each. `index`: int32 [B]."""
    return {name: values[index] for name, values in memory.items()}


def write(memory: Memory, index: jax.Array, rows: Memory) -> Memory:
    """`memory` with the values of a batch's examples replaced by `rows`, [B] each."""
    return {name: values.at[index].set(rows[name], unique_indices=True) for name, values in memory.items()}


def temperatures(rows: Memory) -> Memory:
    """The temperatures among the rows: the loss is differentiated with respect to them."""
    return {name: values for name, values in rows.items() if name.startswith("temperature_")}


def learn(run: config.Run, rows: Memory, gradients: Memory) -> Memory:
    """`rows` with their temperatures updated: one step of gradient descent with momentum, within bounds (iSogCLR, 2305.11965).

    `gradients` [B] are those of the loss with respect to the temperatures. In the loss, an example's own objective has the factor
    weight / (2 B).
    """
    if not gradients:
        return rows
    term = term_of(run)
    assert isinstance(term, config.Isogclr), "only iSogCLR has temperatures of its examples"
    updated = {}
    for side in SIDES:
        gradient = gradients[f"temperature_{side}"]
        own = jnp.clip(2 * len(gradient) / term.weight * gradient, -MAX_GRADIENT, MAX_GRADIENT)
        momentum = term.temperature_momentum * rows[f"momentum_{side}"] + (1 - term.temperature_momentum) * own
        temperature = rows[f"temperature_{side}"] - term.temperature_lr * momentum
        updated[f"momentum_{side}"] = momentum
        updated[f"temperature_{side}"] = jnp.clip(temperature, term.min_temperature, term.max_temperature)
    return rows | updated
