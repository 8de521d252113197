"""TensorBoard's event files, by tensorboardX's record writer and without its threads: an error, as of a full disk, comes to who
writes and not to a thread that nobody asks."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class Board:
    """The events of a run from one start on, in a file of their own."""

    EVERY = 30.0  # seconds between two flushes, so that they can be looked at meanwhile

    def __init__(self, folder: Path, step: int) -> None:
        """What earlier files say of steps after `step` finished ones is hidden by TensorBoard."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{step}")
        self._flushed = time.monotonic()
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, each named `group/name` or `name`."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(name, value))
        self._pulse()

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures, uint8 [h, w, 3], each named as a curve is."""
        for name, picture in pictures.items():
            self._add(step, summary=summary.image(name, picture, dataformats="HWC"))
        self._pulse()

    def _pulse(self) -> None:
        if time.monotonic() - self._flushed > self.EVERY:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **what: object) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
