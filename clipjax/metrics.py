"""What a run says about itself: a clock, counts, the model's FLOPs, and the writers of a workdir."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.chips import chip_of
from clipjax.config import ImageTower, Model, TextTower
from clipjax.files import Mirror, scheme, write_whole


class Clock:
    """Where the time between two log lines goes: to training, to waiting for data, or to pauses that count as neither."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._start, self._examples, self._waited, self._paused = self._now(), 0, 0.0, 0.0

    def count(self, examples: int) -> None:
        """One more step was given `examples` pairs, over all devices."""
        self._examples += examples

    @contextlib.contextmanager
    def waiting(self, work: jax.Array | None = None) -> Iterator[None]:
        """Around next(data). `work` is what the devices were given last: while they are busy with it, nobody waits."""
        start = self._now()
        try:
            yield
        finally:
            if work is None or work.is_ready():
                self._waited += self._now() - start

    @contextlib.contextmanager
    def paused(self, after: Any = None) -> Iterator[None]:
        """Around evaluations, saving, and the first step's compilation. The pause starts when the arrays of `after` (the state)
        are there: steps still under way are training, though the host has gone on.
        """
        jax.block_until_ready(after)
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def read(self) -> dict[str, float]:
        """`examples_per_second` and `data_wait` (share of time, 0 to 1) since the last read, pauses left out."""
        seconds = max(self._now() - self._start - self._paused, 1e-9)
        values = {"examples_per_second": self._examples / seconds, "data_wait": self._waited / seconds}
        self._restart()
        return values


class Tally:
    """How often the data had to be mended, over all hosts: pictures replaced and captions truncated."""

    COUNTED = ("replaced", "truncated")  # bool [b] of a batch each

    def __init__(self) -> None:
        self.total = dict.fromkeys(self.COUNTED, 0)  # of all that was read
        self._since = np.zeros(len(self.COUNTED), np.int32)  # of this process since then

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """One more batch of this process."""
        self._since += [batch[name].sum() for name in self.COUNTED]

    def read(self) -> dict[str, int]:
        """The counts since the last read, or since the run was started or resumed. All processes call it, at the same step."""
        everywhere = multihost_utils.process_allgather(self._since).sum(0) if jax.process_count() > 1 else self._since
        counts = dict(zip(self.COUNTED, everywhere.tolist(), strict=True))
        self.total = {name: self.total[name] + n for name, n in counts.items()}
        self._since[:] = 0
        return counts


def model_flops(model: Model, trained: Collection[str] | None = None, captions: int = 1) -> float:
    """FLOPs of a training step per pair, 2 a multiply-add: 3 times the forward pass of a tower whose blocks are trained, 2 times
    where the gradient only passes through them, once where nothing below the head is. `trained`: paths of the parameters that
    are, as `image/blocks/mlp/up/kernel`; None: all. `captions`: texts a pair has.

    Dot products only, once each whatever is made again in the backward pass. Causal attention counts in full, as it is computed
    and as others count it. Left out: the pooling probe's query, once a batch, and the loss, 8 B d a pair (below 1 % of B/16's
    step up to B = 256k).
    """
    return sum(tower_flops(model, trained, captions).values())


def tower_flops(model: Model, trained: Collection[str] | None = None, captions: int = 1) -> dict[str, float]:
    """`model_flops` of the towers by themselves: `image` and `text`."""
    passes = {tower: 3 if trained is None else _passes(tower, trained) for tower in ("image", "text")}
    forward = {"image": _image_flops(model.image), "text": captions * _text_flops(model.text)}
    return {tower: float(passes[tower] * forward[tower]) for tower in forward}


def _passes(tower: str, trained: Collection[str]) -> int:
    parts = {name.split("/")[1] for name in trained if name.startswith(tower + "/")}
    if "blocks" in parts:
        return 3
    return 2 if parts - {"norm", "map", "projection"} else 1


def _image_flops(c: ImageTower) -> float:
    kept = max(1, round(c.patches * (1 - c.patch_dropout)))
    patch = 2 * c.patches * 3 * c.patch_size**2 * c.width  # of all patches: they are dropped afterwards
    flops = patch + _blocks_flops(c, kept + (c.pool == "cls")) + 2 * c.width * (c.embed_dim or 0)
    if c.pool == "map":
        key_value, attention = 2 * kept * c.width * 2 * c.width, 2 * 2 * kept * c.width
        flops += key_value + attention + 2 * c.width**2 + 2 * 2 * c.width * c.mlp_dim
    return flops


def _text_flops(c: TextTower) -> float:
    return _blocks_flops(c, c.length) + 2 * c.width * (c.embed_dim or 0)


def _blocks_flops(c: ImageTower | TextTower, tokens: int) -> float:
    linear = 2 * (3 * c.width**2 + c.width**2 + 2 * c.width * c.mlp_dim)  # a token: q, k, v; out; up and down
    attention = 2 * 2 * tokens * c.width  # a token: scores and weighted values
    return c.depth * tokens * (linear + attention)


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this `device_kind`; None where it is not known, as for CPUs and slices of a GPU."""
    chip = chip_of(kind)
    return None if chip is None else chip.flops / chip.devices


def mfu(flops_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Model-FLOPs utilisation, 0 to 1: FLOPs the model needs against the bf16 peak of `devices`. None where that is not known."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else flops_per_second / (peak * len(devices))


class NonFiniteError(FloatingPointError):
    """A loss or norm that is NaN or infinite, and the finished steps when it was."""

    def __init__(self, name: str, value: float, step: int) -> None:
        super().__init__(f"{name} = {value} at step {step}")
        self.step = step


class Writer:
    """metrics.jsonl and tensorboard/ of a workdir. Every process reads values and checks them; process 0 writes. A remote workdir
    has copies: of metrics.jsonl at every checkpoint and evaluation, of all at the end and Mirror.EVERY seconds late in between.

    Device values are read one interval late, so that the host never waits for the newest step.
    """

    CHECKED = ("loss", "grad_norm", "param_norm", "update_norm")  # must be finite in every step

    def __init__(self, workdir: Path, step: int = 0) -> None:
        """`step`: finished steps of the state that the run goes on from; what the files say of later ones is removed."""
        self._before: list[tuple] = []  # from the last line on
        self._since: list[tuple] = []  # after it
        self._file = self._board = self._mirror = None
        if jax.process_index() == 0:
            import tensorboardX  # here: the step benchmark runs without it

            if scheme(workdir):
                self._mirror = Mirror(workdir)
                self._mirror.fetch("metrics.jsonl")
                workdir = self._mirror.local
            workdir.mkdir(parents=True, exist_ok=True)
            _truncate(workdir / "metrics.jsonl", step)
            self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=30, filename_suffix=f".{step}", max_queue=0
            )  # no bound: where its thread has died, of a full disk, a full queue would wait for it for ever

    def push(self, step: int, values: Mapping[str, jax.Array], host: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Hands over the scalars of a step, `step` being the number of finished ones.

        With `host`, numbers (or None) such as Clock.read(), the step becomes a line; without, it is checked only. Returns the
        line that was written, which is that of an interval ago, or None. Raises NonFiniteError for the first step whose values
        are not finite.
        """
        if host is None:
            self._since.append((step, {k: values[k] for k in self.CHECKED if k in values}, None))
            return None
        ready, self._before, self._since = self._before, [*self._since, (step, dict(values), dict(host))], []
        return self._read(ready)

    def flush(self) -> dict[str, Any] | None:
        """Reads all that was pushed, waiting for the newest step: before each checkpoint, so that none holds a state gone bad and
        a run that resumes from it misses no line.
        """
        ready, self._before, self._since = self._before + self._since, [], []
        line = self._read(ready)
        self._upload()
        return line

    def evaluation(self, step: int, task: str, metrics: Mapping[str, float], **more: str) -> None:
        """Writes an evaluator's line: `step`, `task`, `metrics` and what `more` names, as the dataset."""
        values = {name: float(value) for name, value in metrics.items()}
        self._write({"step": step, "task": task, **more, "metrics": values}, "/".join([task, *more.values(), ""]), values)
        self._upload()  # a checkpoint may follow, and whoever resumes from it does not evaluate again

    def close(self) -> None:
        """Ends the files. What was pushed since the last flush is dropped."""
        if self._file is not None and self._board is not None:
            self._file.close()
            if self._board_lives():
                self._board.close()
            else:
                dead = self._board.file_writer.event_writer
                dead._event_queue.cancel_join_thread()  # nobody empties it any more
                dead._closed = True  # else it tries once more when Python ends
        if self._mirror is not None:
            self._mirror.close()

    def _board_lives(self) -> bool:
        return self._board is not None and self._board.file_writer.event_writer._worker.is_alive()

    def _upload(self) -> None:
        """Everything so far, where the workdir is remote."""
        if self._mirror is not None and self._board is not None:
            self._board.flush()
            self._mirror.push()

    def _read(self, steps: list[tuple]) -> dict[str, Any] | None:
        line = None
        fetched = jax.device_get([values for _, values, _ in steps])
        for (step, _, host), values in zip(steps, fetched, strict=True):
            for name in self.CHECKED:
                if name in values and not math.isfinite(values[name]):
                    raise NonFiniteError(name, float(values[name]), step)
            if host is not None:
                # str: a float32 in as few digits as tell it from its neighbours, 0.2 and not 0.20000000298
                line = {"step": step} | {k: float(str(v)) for k, v in values.items()} | host
                self._write(line, "", {k: v for k, v in line.items() if k != "step"})
        return line

    def _write(self, line: Mapping[str, Any], prefix: str, scalars: Mapping[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(_strict(line), allow_nan=False) + "\n")
        self._file.flush()
        if not self._board_lives():
            raise OSError(errno.ENOSPC, "tensorboard/ can't be written any more; most likely the disk is full")
        for name, value in scalars.items():
            if value is None:
                continue  # not known here, as the utilisation of a CPU
            self._board.add_scalar(prefix + name, value, line["step"])
        if self._mirror is not None:
            self._mirror.pulse()


def _strict(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> None:
    """Removes lines past `step` and torn ones, at once or not at all."""

    def holds(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    before = path.read_bytes() if path.exists() else b""
    after = b"".join(line for line in before.splitlines(keepends=True) if holds(line))
    if after != before:
        with write_whole(path) as part, part.open("wb") as f:
            f.write(after)
            f.flush()
            os.fsync(f.fileno())
