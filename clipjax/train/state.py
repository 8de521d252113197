"""The state that a training step updates, and how it is made on the mesh."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from clipjax import config, sharding
from clipjax.models import clip
from clipjax.train import memory
from clipjax.train.memory import Memory
from clipjax.train.optimizer import trained_names

NOTHING: Mapping[str, ArrayLike] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds."""

    step: jax.Array  # int32 [], finished steps
    params: clip.Params  # float32 master weights
    opt_state: optax.OptState
    ema: clip.Params | None  # moving average of the weights but for class vectors, where optim.ema asks for one
    memory: Memory = dataclasses.field(default_factory=dict)  # values of every example (see train/memory.py)
    # int32 []: with train.nonfinite = skip, how many steps before this one, in a row, were not finite
    skipped_in_row: jax.Array | None = None

    @property
    def evaluated(self) -> clip.Params:
        """The weights that evaluations use: the moving average, if there is one; without class vectors."""
        return clip.without_classes(self.params) if self.ema is None else self.ema


def _fresh(run: config.Run, tx: optax.GradientTransformation, devices: int, given: Mapping[str, jax.Array]) -> TrainState:
    drawn = clip.init(run.model, run.seed)
    params = jax.tree.map_with_path(lambda path, p: given.get(sharding.keystr(path), p), drawn)
    ema = clip.without_classes(params) if run.optim.ema is not None else None
    zero = jnp.zeros((), jnp.int32)
    in_row = zero if run.train.nonfinite == "skip" else None
    return TrainState(zero, params, tx.init(params), ema, memory.initial(run, devices), in_row)


def state_shapes(run: config.Run, tx: optax.GradientTransformation, devices: int = 1) -> TrainState:
    """The shapes and dtypes of a run's state, without arrays. `devices`: over which the batch is sharded."""
    return jax.eval_shape(lambda: _fresh(run, tx, devices, {}))


def abstract_state(run: config.Run, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of a run's state, without arrays. A checkpoint is restored into it.

    Raises ConfigError where the mesh would replicate what it should shard.
    """
    sharding.check_tensor(run.model, mesh)
    sharding.check_classes(run.model, mesh)
    state = state_shapes(run, tx, sharding.batch_devices(mesh))
    return sharding.shapes(state, mesh, over_data=over_data(run, mesh, state.params))


def over_data(run: config.Run, mesh: Mesh, params: clip.Params) -> set[str]:
    """The names of the parameters that are sharded over `data`, too: with mesh.shard_optimizer those that are trained."""
    return trained_names(run.optim_in_use.rules, params) if sharding.shards_optimizer(run.mesh, mesh) else set()


def weight_specs(run: config.Run, mesh: Mesh) -> Any:
    """The PartitionSpecs of the parameters that the towers read. P() for all if mesh.shard_optimizer does not shard them."""
    params = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    names = over_data(run, mesh, params)
    placed = sharding.shardings({"params": params}, mesh, names)["params"]
    return jax.tree.map(lambda x: x.spec, clip.without_classes(placed)) if names else P()


def initial_state(
    run: config.Run, tx: optax.GradientTransformation, mesh: Mesh, given: Mapping[str, ArrayLike] = NOTHING
) -> TrainState:
    """The state before the first step. It is made shard by shard on its devices: no host or device ever holds a full copy of a
    sharded array. `given`: parameters by their paths, in place of new ones; those that lie on the devices are used up."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, tx, mesh))

    @functools.partial(jax.jit, out_shardings=shardings, donate_argnums=0)
    def make(placed: dict[str, jax.Array], others: dict[str, jax.Array]) -> TrainState:
        return _fresh(run, tx, sharding.batch_devices(mesh), placed | others)

    placed = {name: x for name, x in given.items() if isinstance(x, jax.Array)}
    return make(placed, {name: x for name, x in given.items() if name not in placed})
