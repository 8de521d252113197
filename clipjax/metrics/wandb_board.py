"""Weights & Biases, beside TensorBoard: a run's lines of metrics as the rows of a W&B run, each once, however often it resumes.

An error of W&B costs a warning, never the training.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipjax import config
from clipjax.files import write_json
from clipjax.preemption import Preempted

RECORD = "wandb.json"  # file of a workdir: which W&B run it belongs to, and what was sent there
PATIENCE = 60  # seconds to wait for W&B's server when a run begins
FAREWELL = 15  # seconds to wait for it when a run ends: less than the notice before machines are taken away


def require_package(project: str) -> None:
    """Raises ConfigError where wandb is not installed. A folder of that name, as W&B makes them, is no package."""
    found = importlib.util.find_spec("wandb")
    remedy = "needs the package wandb, which is not installed: pip install 'clipjax[wandb]'"
    config.require(found is not None and found.origin is not None, "train.wandb", project, remedy)


class WandbBoard:
    """One W&B run. A row has `step`, which is the axis of all curves, and the values of a line or the images of an evaluation."""

    def __init__(self, run: config.Run, folder: Path, workdir: Path, step: int) -> None:
        """`folder`: the local folder for the record; not `workdir` where that is remote. `step`: finished steps at the start.

        A run that resumes goes on in its W&B run. One that starts at step 0 begins another, as does one whose project changed.
        """
        self._file, self._warned = folder / RECORD, False
        project = run.train.wandb
        self._record: dict[str, Any] = {"project": project, "id": uuid.uuid4().hex[:8], "next_row": 0, "sent": {}}
        if step > 0 and (saved := _read(self._file)) and saved["project"] == project:
            self._record = saved
        self._sent_before: dict[str, int] = dict(self._record["sent"])  # group -> the newest step that an earlier start has sent
        self._run: Any = None
        with self._guard():
            local = None if "WANDB_DIR" in os.environ or folder != workdir else str(folder)
            self._run = self._begin(name=workdir.name, dir=local, config=json.loads(config.to_json(run)))
            write_json(self._file, self._record)

    def _begin(self, **more: Any) -> Any:
        """Opens the W&B run; where the server does not let us in, on this machine alone, for `wandb sync`."""
        import wandb

        *entity, project = str(self._record["project"]).split("/")
        settings = wandb.Settings(
            console="off",  # W&B would replace sys.stderr, which the progress line has replaced
            silent=True,
            login_timeout=PATIENCE,
            init_timeout=PATIENCE,
            finish_timeout=FAREWELL,  # the rest stays on this machine, for `wandb sync`
            x_transaction_log_flush_interval=0.1,  # seconds: a killed process loses this much of an offline run, not 15
        )
        more |= dict(project=project, entity=entity[0] if entity else None, id=self._record["id"], settings=settings)
        try:
            opened = wandb.init(resume="allow", **more)
        except Exception as error:
            if os.environ.get("WANDB_MODE", "online") != "online":
                raise
            self._warn(f"{error}; it is written to this machine only")
            wandb.teardown()  # else its process still waits for the server, and writes nothing
            opened = wandb.init(resume="allow", mode="offline", **more)
        opened.define_metric("step", hidden=True)
        opened.define_metric("*", step_metric="step")
        place = f"`wandb sync --append {Path(opened.dir).parent}` sends it" if opened.offline else opened.url or "disabled"
        print(f"Weights & Biases, run {opened.id}: {place}", file=sys.stderr, flush=True)
        return opened

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Sends the values of a line, unless an earlier start of the run has sent that line. `group`: begins their names, as
        `task/dataset/`; empty for a training line."""
        self._send(step, group, dict(values))

    def images(self, step: int, group: str, images: Mapping[str, np.ndarray]) -> None:
        """Sends images, uint8 [h, w, 3], of an evaluation whose values were sent before."""
        with self._guard():
            import wandb

            self._send(step, group, {name: wandb.Image(image) for name, image in images.items()})

    def flush(self) -> None:
        """W&B sends in a process of its own."""

    def close(self) -> None:
        """Ends the W&B run: as finished, as preempted, or as failed where an error ends the training."""
        error = sys.exc_info()[1]
        with self._guard():
            if self._run is not None and isinstance(error, Preempted):
                self._run.mark_preempting()
            if self._run is not None:
                self._run.finish(exit_code=0 if error is None else 1)

    def _send(self, step: int, group: str, values: dict[str, Any]) -> None:
        if self._run is None or not values or step <= self._sent_before.get(group, -1):
            return
        with self._guard():
            # W&B ignores a row whose number is not above that of the last. The number is the step, where that is free.
            row = max(step, self._record["next_row"], self._run.step)
            self._record["next_row"] = row + 1
            self._record["sent"][group] = step
            write_json(self._file, self._record)
            self._run.log({"step": step} | {group + name: value for name, value in values.items()}, step=row, commit=True)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # W&B, its server and the network have many
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        """Once in a run."""
        if not self._warned:
            logging.warning(f"train.wandb: {' '.join(text.split())}; the training goes on")
        self._warned = True


def _read(file: Path) -> dict[str, Any] | None:
    """The record; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.keys() == {"project", "id", "next_row", "sent"}:
            return record
    return None
