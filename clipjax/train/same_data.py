"""A run goes on with the data that it was trained on, unless its user says otherwise."""

import dataclasses
import json
import zlib

from clipjax import config, distributed
from clipjax.data import fingerprint
from clipjax.data.source import Source
from clipjax.restore import read_fingerprint
from clipjax.train.report import say
from clipjax.train.workdir import Workdir


def recognized(workdir: Workdir, source: Source, accept_new: bool = False) -> Workdir:
    """`workdir` with the fingerprint of `source`, which its checkpoints will hold; compared with that of the checkpoint to resume
    from. A checkpoint of release 0.3 or earlier has none, and fits any data. So does another run's, from which this one starts.

    Raises ConfigError for other data, which `accept_new` allows, and where the processes find different data."""
    now = fingerprint.of(source)
    distributed.agree("the fingerprint of the data", zlib.crc32(json.dumps(now).encode()))
    workdir = dataclasses.replace(workdir, fingerprint=now)
    saved = None if workdir.saved is None else read_fingerprint(workdir.path, workdir.saved.step)
    if saved is None or not (rows := fingerprint.differences(saved, now, source)):
        return workdir
    if accept_new:
        say(f"{workdir.path}: the data are others than before, as --accept-new-data allows: {'; '.join(rows)}")
        return workdir
    remedy = (
        "bring those back; or --accept-new-data goes on with these; or choose a new --workdir, which init starts from this one"
    )
    what = f"are not the data that {workdir.path}@{workdir.saved.step} was trained on; {remedy}"
    raise config.ConfigError("\n  ".join([f"data: {source.name}: {what}:", *rows]))
