"""A small run of several processes on noise, one of which fails as DOES says. WORKDIR is its folder, WHO the process."""

import contextlib
import dataclasses
import os
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax import config, distributed, eval_commands, sharding
from clipjax.metrics.writer import MetricsWriter
from tests.train import tiny

WORKDIR = Path(os.environ["WORKDIR"])
does = os.environ["DOES"]
RUN = tiny.run(train=config.Train(steps=6, batch_size=16, log_every=1, checkpoint_every=2, keep=9))


def fails(what):
    """Whether this process is to fail in this way."""
    return does == what and jax.process_index() == int(os.environ["WHO"])


def read(start):
    n = 16 // jax.process_count()
    mine = slice(n * jax.process_index(), n * (jax.process_index() + 1))
    for step, batch in list(enumerate(tiny.batches(RUN, 6)))[start:]:
        if step == 5 and fails("data"):
            raise TypeError("a mistake in the data")
        if step == 3 and fails("save"):
            while not (WORKDIR / "checkpoints" / "2").exists():
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        yield {name: value[mine] for name, value in batch.items()} | tiny.marks(n)


@dataclasses.dataclass
class Evaluator:
    task: str = "rows"
    dataset: str = "noise"

    def due(self, step):
        return step % 4 == 0

    def run(self, params, step):
        if step == 4 and fails("evaluation"):
            raise TypeError("a mistake in the evaluation")
        return {"count": float(multihost_utils.process_allgather(np.ones(3)).sum())}


def write(self, line, *more):
    if line["step"] == 5 and fails("metrics"):
        raise OSError(28, "No space left on device")
    return written(self, line, *more)


written, MetricsWriter._write = MetricsWriter._write, write


def work(args, wanted):
    distributed.start()
    mesh = sharding.make_mesh(config.Mesh())
    tiny.train_in(WORKDIR, RUN, lambda start: contextlib.nullcontext(read(start)), [Evaluator()], mesh)


if __name__ == "__main__":
    eval_commands.evaluate = work
    from clipjax import cli

    sys.exit(cli.main(["eval", "retrieval", "RUN", "--data", "emoji"]))
