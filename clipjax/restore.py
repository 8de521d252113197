"""What a workdir's checkpoints hold, read without writing: configurations, states, weights."""

import contextlib
import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clipjax import config, distributed, s3, sharding
from clipjax.config.start import split_name
from clipjax.files import resolve
from clipjax.models import clip
from clipjax.models.lora import merged
from clipjax.storage import WEIGHTS_ONLY, DamagedError, reading
from clipjax.train.state import TrainState

COUNTS = "counts"  # item of a checkpoint, only with train.nonfinite = skip
FINGERPRINT = "data"  # item of a checkpoint: of the data that it was trained on; older ones have none
DAMAGED = "damaged"  # folder of a workdir, beside checkpoints/, for checkpoints that could not be read


def training_part(state: TrainState) -> dict[str, Any]:
    """The part of the state that only training needs, with the names that it has on disk."""
    values: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    return values | ({"memory": state.memory} if state.memory else {})


def _reader(workdir: Path) -> ocp.CheckpointManager:
    """Reads a workdir that has checkpoints. Writes nothing and removes nothing.

    Each process reads its part without waiting for the others, because it may find damage where they find none.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}")
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone, **s3.options(workdir))
    return ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options)


def read_config(reader: ocp.CheckpointManager, step: int) -> config.Run:
    saved = reader.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return config.from_json(json.dumps(saved["config"]))


def read_fingerprint(workdir: Path, step: int) -> dict[str, Any] | None:
    """What a checkpoint says of the data that it was trained on (`data.fingerprint.of`); None if it says nothing."""
    if not (workdir / "checkpoints" / str(step) / FINGERPRINT).exists():
        return None
    with reading(workdir, step), _reader(workdir) as reader:
        return reader.restore(step, args=ocp.args.Composite(**{FINGERPRINT: ocp.args.JsonRestore()}))[FINGERPRINT]


def newest(workdir: Path) -> tuple[int, config.Run] | None:
    """The step and the configuration of a workdir's newest checkpoint; None where there is no checkpoint.

    Skips checkpoints whose configuration can't be read. Raises DamagedError where there are some and none can be read: a run must
    not start again from step 0 unless its user says so.
    """
    if not (workdir / "checkpoints").exists():
        return None
    aside = sorted(p.name for p in (workdir / DAMAGED).iterdir()) if (workdir / DAMAGED).exists() else []
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(DamagedError), reading(workdir, step):
                return step, read_config(reader, step)
    if steps or aside:
        names = ", ".join([str(step) for step in steps] + [f"{DAMAGED}/{name}" for name in aside])
        remedy = f"put a copy into {workdir / 'checkpoints'}, choose a new --workdir, or remove these to begin at step 0"
        raise DamagedError(f"{workdir}: none of its checkpoints can be read ({names}). Remedy: {remedy}")
    return None


def require_state(workdir: Path, step: int, field: str) -> None:
    """Raises ConfigError for a checkpoint that holds weights alone. `field`: what names it."""
    remedy = "holds weights only, no state of training: choose a new --workdir, and start it from them by "
    config.require(_has_state(workdir, step), field, str(workdir), remedy + f"init = Init(run='{workdir}', state='weights')")


def restore(workdir: Path, step: int, abstract: TrainState) -> TrainState:
    """The state as it was saved, sharded as `abstract` (shapes with shardings) says. Its mesh may differ from the saved one.

    Raises DamagedError on all processes if one of them can't read its part.
    """
    items = {"params": ocp.args.StandardRestore(abstract.params)}
    # The example memory has a few numbers after the last example, as many as the mesh asks for: they come and go unread.
    items["training"] = ocp.args.StandardRestore(training_part(abstract), strict=not abstract.memory)
    if abstract.ema is not None:
        items["ema"] = ocp.args.StandardRestore(abstract.ema)
    if abstract.skipped_in_row is not None and (workdir / "checkpoints" / str(step) / COUNTS).exists():
        items[COUNTS] = ocp.args.StandardRestore({"skipped_in_row": abstract.skipped_in_row})
    error = None
    try:
        with reading(workdir, step), _reader(workdir) as reader:
            got = reader.restore(step, args=ocp.args.Composite(**items))
    except DamagedError as e:
        error = e
    if not multihost_utils.process_allgather(np.array([error is None])).all():
        raise error or DamagedError(f"{workdir}@{step} can't be read by another process")
    training, in_row = got.training, got.get(COUNTS, {}).get("skipped_in_row")
    if abstract.skipped_in_row is not None and in_row is None:  # train.nonfinite was `stop` so far
        in_row = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=abstract.skipped_in_row.sharding)()
    memory = training.get("memory", {})
    return TrainState(training["step"], got.params, training["opt_state"], got.get("ema"), memory, in_row)


def _has_state(workdir: Path, step: int) -> bool:
    return not (workdir / "checkpoints" / str(step) / WEIGHTS_ONLY).exists()


def look_up(name: str, field: str = "RUN") -> tuple[Path, int, config.Run]:
    """The workdir, the step and the configuration of the checkpoint `RUN[@STEP]`.

    Raises ConfigError where there is no such checkpoint, with `field` for its name, and DamagedError where it can't be read.
    """
    workdir, step = split_name(name, field)
    exists = (workdir / "checkpoints").exists()
    config.require(exists, field, name, "has no checkpoint yet: it was stopped before the first was written")
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps())
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            found = ", ".join(map(str, steps)) or "(none)"
            raise config.ConfigError(f"{field} = {name!r}: has checkpoints of steps {found} only")
        distributed.agree("the checkpoint's step", step)
        with reading(workdir, step):
            return workdir, step, read_config(reader, step)


def load_params(name: str, mesh: Mesh, heads: bool = False) -> tuple[config.Run, clip.Params, int]:
    """The configuration, the weights that evaluation uses (the moving average where there is one) and the step of `RUN[@STEP]`.

    Adapters of low rank are merged into their kernels: neither the configuration nor the weights have them. The weights have no
    class vectors, and only with `heads` the terms' heads. Raises as `look_up`.
    """
    workdir, step, run = look_up(name)
    model, params = load_weights(workdir, step, run, mesh, heads=heads)
    return dataclasses.replace(run, model=model), params, step


def load_weights(
    workdir: Path, step: int, run: config.Run, mesh: Mesh, parts: Collection[str] = (), heads: bool = False
) -> tuple[config.Model, clip.Params]:
    """The model and the weights of `load_params`, of a checkpoint of `run`. `parts`: the parts of the tree to read, as `image`;
    none: all but class vectors, and heads only with `heads`, if there are some. Raises DamagedError where they can't be read.
    """
    tree = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    left = {clip.CLASSES, *(() if heads and _has_state(workdir, step) else (clip.HEADS,))}
    wanted = {part: below for part, below in tree.items() if part in parts or (not parts and part not in left)}
    target, partial = sharding.shapes(wanted, mesh, part=bool(parts)), wanted.keys() != tree.keys()
    options = ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial)
    item = "params" if run.optim.ema is None else "ema"
    with reading(workdir, step), _reader(workdir) as reader:
        params = reader.restore(step, args=ocp.args.Composite(**{item: options}))[item]
    return merged(run.model, params)
