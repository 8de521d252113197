"""A run goes on with the data that it was trained on, unless its user says otherwise."""

import dataclasses
import json
import zlib
from pathlib import Path

from clipjax import config, distributed
from clipjax.data import fingerprint
from clipjax.data.fingerprint import Fingerprint
from clipjax.data.source import Source
from clipjax.restore import read_fingerprint
from clipjax.storage import DamagedError
from clipjax.train.report import say
from clipjax.train.workdir import Workdir


def recognized(workdir: Workdir, source: Source, accept_new: bool = False) -> Workdir:
    """`workdir` with the fingerprint of `source`, which its checkpoints will hold; compared with that of the checkpoint to resume
    from. An older checkpoint has none, and fits any data. So does that of another run, from which this one starts.

    Raises ConfigError for other data, which `accept_new` allows, and where the processes find different data."""
    now = fingerprint.of(source)
    distributed.agree("the fingerprint of the data", zlib.crc32(json.dumps(now).encode()))
    known, saved = dataclasses.replace(workdir, fingerprint=now), workdir.saved
    before = None if saved is None else _fingerprint(workdir.path, saved.step)
    if saved is None or before is None or not (rows := fingerprint.differences(before, now, source)):
        return known
    if accept_new:
        say(f"{workdir.path}: the data are others than before, as --accept-new-data allows: {'; '.join(rows)}")
        return known
    what = f"is not what {workdir.path}@{saved.step} was trained on"
    remedy = "bring that back, go on with this by --accept-new-data, or choose a new --workdir, which init starts from this one"
    raise config.ConfigError("\n  ".join([f"data = {source.name}: {what}; {remedy}:", *rows]))


def _fingerprint(workdir: Path, step: int) -> Fingerprint | None:
    """That of a checkpoint. One that is damaged is no reason to leave a sound state: it is told, and nothing is compared."""
    try:
        return read_fingerprint(workdir, step)
    except DamagedError as error:
        say(f"which data it was trained on is not known: {error}")
        return None
