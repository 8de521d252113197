"""What a term of the objective remembers of every training example: SogCLR's moving averages, iSogCLR's temperatures.

A dict of float32 [n], n at least the number of examples, by their index in the dataset; it lies over the devices of the batch. A
batch's rows are read before the loss and written after it; no index comes twice in a batch.
"""

import jax
import jax.numpy as jnp

from clipjax import config
from clipjax.losses.sogclr import UNSEEN

Memory = dict[str, jax.Array]
SIDES = ("image", "text")
ROUND = 1024  # n is a multiple of it, so that it divides over any usual mesh, and a run may go on on another
LARGEST = 5.0  # gradient of a temperature that is taken at its word (2305.11965's code)


def term_of(run: config.Run) -> config.Sogclr | config.Isogclr | None:
    """The term that remembers, if there is one."""
    return next((t for t in run.objective if isinstance(t, config.Sogclr | config.Isogclr) and t.weight), None)


def initial(run: config.Run) -> Memory:
    """Before the first visit of any example."""
    term = term_of(run)
    if term is None:
        return {}
    n = -(-term.examples // ROUND) * ROUND
    made = {f"log_u_{side}": jnp.full(n, UNSEEN) for side in SIDES}
    if isinstance(term, config.Isogclr):
        made |= {f"temperature_{side}": jnp.full(n, term.temperature) for side in SIDES}
        made |= {f"momentum_{side}": jnp.zeros(n) for side in SIDES}
    return made


def read(memory: Memory, index: jax.Array) -> Memory:
    """The rows of a batch, [B] each."""
    return {name: values[index] for name, values in memory.items()}


def write(memory: Memory, index: jax.Array, rows: Memory) -> Memory:
    """With the rows of a batch in their places."""
    return {name: values.at[index].set(rows[name], unique_indices=True) for name, values in memory.items()}


def temperatures(rows: Memory) -> Memory:
    """Those of the rows, which the loss is differentiated by."""
    return {name: values for name, values in rows.items() if name.startswith("temperature_")}


def learn(run: config.Run, rows: Memory, gradients: Memory) -> Memory:
    """`rows` with their temperatures moved: momentum, and a step that stays within bounds (2305.11965; METHODS A.11).

    `gradients` are of the loss, in which an example has weight / 2B of its own objective.
    """
    if not gradients:
        return rows
    term = term_of(run)
    moved = {}
    for side in SIDES:
        gradient = gradients[f"temperature_{side}"]
        own = jnp.clip(2 * len(gradient) / term.weight * gradient, -LARGEST, LARGEST)
        momentum = term.temperature_momentum * rows[f"momentum_{side}"] + (1 - term.temperature_momentum) * own
        temperature = rows[f"temperature_{side}"] - term.temperature_lr * momentum
        moved[f"momentum_{side}"] = momentum
        moved[f"temperature_{side}"] = jnp.clip(temperature, term.min_temperature, term.max_temperature)
    return rows | moved
