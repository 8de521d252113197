"""TensorBoard's event files, written by tensorboardX's record writer without its threads.

So the caller gets an error of a write, as that of a full disk. In a thread it would be lost.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

# protobuf makes these classes at run time, where a type checker does not see them
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class Board:
    """One event file: the events from one start of a run on."""

    EVERY = 30.0  # seconds between two flushes: TensorBoard shows the values while the run goes on

    def __init__(self, folder: Path, step: int) -> None:
        """TensorBoard hides the values that earlier files hold of steps after `step`, the number of finished steps."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{step}")
        self._flushed = time.monotonic()
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Adds a point to each curve. `group`: begins their names, as `task/dataset/`; empty for a training line."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(group + name, value))
        self._flush_now_and_then()

    def images(self, step: int, group: str, images: Mapping[str, np.ndarray]) -> None:
        """Adds images, uint8 [h, w, 3], named as curves are."""
        for name, image in images.items():
            self._add(step, summary=summary.image(group + name, image, dataformats="HWC"))
        self._flush_now_and_then()

    def _flush_now_and_then(self) -> None:
        if time.monotonic() - self._flushed > self.EVERY:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **what: object) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
