"""train.nonfinite = skip: a step whose loss or gradient norm is not finite changes nothing. The devices decide it by themselves.

Such a step is counted as a step, so the next one has the next batch. It is not counted by the optimizer: learning rate, bias
correction and moving average go on from the update before it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from clipjax.train.optimizer import finished_updates
from clipjax.train.state import TrainState

Tree = Any  # of arrays
Choose = Callable[[Tree, Tree], Tree]  # (new, old) -> new, but old in a step that is skipped


def choice(mode: Literal["stop", "skip"], loss: jax.Array, gradient: Tree) -> Choose:
    """Chooses between what a step would change to and what was there, leaf by leaf. With `stop` it is always the new."""
    if mode == "stop":
        return lambda new, old: new
    is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
    return lambda new, old: jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), new, old)


def updates(state: TrainState) -> jax.Array:
    """How many steps have changed the state, int32 []."""
    return state.step if state.skipped_in_row is None else finished_updates(state.opt_state)


def count(state: TrainState, opt_state: optax.OptState, choose: Choose) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """The new `TrainState.skipped_in_row`, and for the metrics `skipped_in_row` float32 [] and `skipped_steps` int32 [], of all
    steps so far. With `stop` there is nothing to count.

    `opt_state`: the new one.
    """
    if state.skipped_in_row is None:
        return None, {}
    in_row = choose(jnp.zeros_like(state.skipped_in_row), state.skipped_in_row + 1)
    return in_row, {"skipped_in_row": in_row.astype(jnp.float32), "skipped_steps": state.step + 1 - finished_updates(opt_state)}
