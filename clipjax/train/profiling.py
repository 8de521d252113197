"""`--profile`: a trace of some steps, for TensorBoard's profile page and for Perfetto."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]: nothing public knows what is loaded

from clipjax import distributed
from clipjax.files import write_atomic
from clipjax.train.report import say

FOLDER = "profile"  # of a workdir


class Profile:
    """Traces the steps that begin with FROM to TO - 1 finished ones, on every process. A trace that fails costs a warning.

    A context manager: its end writes what was traced of a run that ends earlier. Only at the two ends of the trace the loop waits
    for the devices: a trace that begins or ends in the middle of a step says little of it.
    """

    def __init__(self, steps: range, start: int, workdir: Path, pause: Callable[[], AbstractContextManager[None]]) -> None:
        """`start`: finished steps of the run. `pause`: for `with`; waits for the devices, and does not count as training."""
        self._steps, self._folder, self._pause = steps, workdir / FOLDER, pause
        self._local: str | None = None  # the folder of a running trace: JAX writes to local folders, the workdir may be remote
        self._traced = range(0)
        if steps and start >= steps.stop:
            say(f"{self._option}: nothing to trace: {start:,} steps are finished")

    @property
    def _option(self) -> str:
        return f"--profile {self._steps.start}:{self._steps.stop}"

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """For `with`, around the step that begins with `step` finished ones."""
        if step not in self._steps:
            yield
            return
        if not self._traced:
            self._begin(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._traced = range(self._traced.start, step + 1)
        if step + 1 == self._steps.stop:
            distributed.enter_stage(step + 1, "evaluating or saving")
            with self._pause():
                self._write()

    def _begin(self, step: int) -> None:
        distributed.enter_stage(step, "evaluating or saving")
        self._traced = range(step, step + 1)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the steps down, and fills the trace with the host's calls
        with self._pause(), self._warning():
            if jax.default_backend() != "tpu" and _jax.pjrt_plugin_loaded("tpu"):
                raise RuntimeError("libtpu is loaded, and there is no TPU: of another version than JAX, it would end the process")
            folder = tempfile.mkdtemp(prefix="clipjax-")
            jax.profiler.start_trace(folder, profiler_options=options)
            self._local = folder

    def _write(self) -> None:
        """Ends the trace, and copies it to the workdir. Does nothing where none is running."""
        if (local := self._local) is None:
            return
        steps, self._local = self._traced, None
        target = self._folder / "plugins" / "profile" / f"{steps.start}-{steps.stop}"  # where TensorBoard looks for it
        with self._warning():
            jax.profiler.stop_trace()
            for file in (p for p in Path(local).rglob("*") if p.is_file()):
                with write_atomic(target / f"{jax.process_index()}-{file.name}") as part:  # a host may have several processes
                    shutil.copyfile(file, part)
            how = f"`tensorboard --logdir {self._folder}` (pip install tensorboard xprof), or https://ui.perfetto.dev"
            say(f"profile of steps {steps.start}:{steps.stop}: {target}; open it with {how} (the .trace.json.gz)")
        shutil.rmtree(local, ignore_errors=True)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """For `with`: an error becomes a warning."""
        try:
            yield
        except Exception as error:  # of the profiler, the disk, a store
            logging.warning(f"{self._option}: {type(error).__name__}: {error}; the run goes on without a profile")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: object) -> None:
        self._write()
