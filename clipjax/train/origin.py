"""Another run's state as the start of a new workdir: `Init(run="RUN[@STEP]", state="all")`.

The new configuration may differ in whatever leaves the shapes of the state as they are: learning rate, schedule, clipping, number
of steps, augmentation, weights of the terms. The place in the data is the step: the next batch is that of the same number, also
where another seed, batch size or dataset makes another order.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from clipjax import config, sharding
from clipjax.models import clip
from clipjax.restore import look_up, require_state, restore
from clipjax.storage import DamagedError
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import TrainState, state_shapes

# Fields that make the order of the data, and the numbers of the examples, which a memory goes by.
ORDER = r"seed|train\.batch_size|data\.(order|lanes|window)|data\.(sources\.\d+\.)?(spec|split|weight|repeat)"
INDICES = r"data\.(sources\.\d+\.)?(spec|split|image_field)"
STATE = r"(model|objective)\..*|optim\.(kind|mu_dtype|b1|ema|rules.*)"  # fields that may make the shapes of the state
SHOWN = 3  # arrays that a message names


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another run that a new workdir starts from."""

    path: Path
    step: int  # finished steps
    run: config.Run  # as it was when the checkpoint was saved

    def __str__(self) -> str:
        return f"{self.path}@{self.step}"

    @property
    def tokenizer(self) -> Path:
        """The workdir whose tokenizer the run has."""
        return self.path


def find_origin(run: config.Run) -> Origin:
    """The checkpoint whose whole state `run.init` asks for.

    Raises ConfigError where there is none or it can't be read, and where its state is not one of `run`.
    """
    assert run.init is not None, "only init gives an origin"
    with naming("init.run", run.init.run):
        origin = Origin(*look_up(run.init.run, "init.run"))
    require_state(origin.path, origin.step, "init.run")
    remedy = f"{origin} has {origin.step:,} finished steps already: ask for more"
    config.require(origin.step < run.train.steps, "train.steps", run.train.steps, remedy)
    if wrong := _differences(origin.run, run):
        rows = "\n  ".join(wrong)
        remedy = "the state of that run does not fit this one; change these back, or leave init out"
        raise config.ConfigError(f"init.run = {run.init.run!r}: {remedy}:\n  {rows}")
    return origin


def restore_origin(run: config.Run, origin: Origin, abstract: TrainState) -> TrainState:
    """The state of `origin`, sharded as `abstract` says. Raises ConfigError where it can't be read."""
    assert run.init is not None, "only init gives an origin"
    with naming("init.run", run.init.run):
        return restore(origin.path, origin.step, abstract)


def changes_order(before: config.Run, run: config.Run) -> bool:
    """Whether a batch of some number has other examples in `run` than in `before`."""
    return bool(_named(ORDER, before, run))


@contextlib.contextmanager
def naming(field: str, name: str) -> Iterator[None]:
    """For `with`: makes a ConfigError of the DamagedError for a checkpoint that the field of a configuration names."""
    try:
        yield
    except DamagedError as error:
        raise config.ConfigError(f"{field} = {name!r}: {error}; name another step, as RUN@STEP, or another run") from error


def _differences(before: config.Run, run: config.Run) -> list[str]:
    """What keeps the state of the run `before` from being one of `run`: fields and arrays, a line each."""
    old, new = _arrays(before), _arrays(run)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    unlike = [f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]
    fields = r"tokenizer\..*|optim\.kind"
    if any(name.startswith("memory/") for name in old):
        fields += f"|{INDICES}"
    if unlike:
        fields += f"|{STATE}"
    more = [f"and {len(unlike) - SHOWN:,} more arrays"] if len(unlike) > SHOWN else []
    return [*_named(fields, before, run), *unlike[:SHOWN], *more]


def _named(pattern: str, before: config.Run, run: config.Run) -> list[str]:
    """The differences in the fields whose full name matches."""
    return [row for row in config.identity_differences(before, run) if re.fullmatch(pattern, row.partition(":")[0])]


def _arrays(run: config.Run) -> dict[str, str]:
    """The arrays of a run's state, without those that come and go with train.nonfinite: path -> type and shape."""
    params = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    state = state_shapes(run, optimizer_of(run, params))
    named = {sharding.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items() if name != "skipped_in_row"}
