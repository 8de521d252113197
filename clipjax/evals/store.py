"""Vectors of evaluations on disk: they are computed once for each set of weights, and found again by all that decides them.

A file is a table of NumPy, a row for each item: its vector, and what was learned of the item as it was read. Each process keeps
its own rows. A file appears complete or not at all, so an evaluation that is killed leaves none, and another begins the set anew.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt

VECTORS = "z"  # the column of the vectors
MOST = 20 * 10**9  # bytes that a folder holds
SMALL = 1 << 20  # bytes of a file that is read at once
STALE = 86400  # seconds after which an unfinished file is that of a killed process
OURS = re.compile(r"\.?.*-[0-9a-f]{32}\.npy(\.\d+)?")  # a name that `Store._path` makes, or that of an unfinished file

log = logging.getLogger(__name__)


class Store:
    """Files of vectors in a folder of this machine. Where they would be more than `most` bytes, the oldest of them are dropped.
    What else the folder holds is left alone."""

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self.folder, self.most = folder, most

    def find(self, name: str, identity: Mapping[str, Any]) -> np.ndarray | None:
        """The rows of this identity, a table, mapped into memory if it is large; None: there is none. `name`: of the data."""
        path = self._path(name, identity)
        try:
            small = path.stat().st_size < SMALL  # and perhaps without a row: of few items some processes have none
            table = np.load(path, mmap_mode=None if small else "r")
            os.utime(path)  # what is used is not old
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s can't be read and is made anew: %s", path, error)
            return None
        return table

    @contextlib.contextmanager
    def writing(self, name: str, identity: Mapping[str, Any], rows: int) -> Iterator[Callable[[dict[str, np.ndarray]], None]]:
        """For `with`: gives a function that takes the next arrays [n, ...] of all columns, `rows` in all. At the end they can be
        found; after an error nothing is left. A table of more bytes than the folder may hold is not kept."""
        path = self._path(name, identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with part.open("wb") as file:
                yield functools.partial(self._write, file, rows)
            if part.stat().st_size:
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _write(self, file: Any, rows: int, arrays: dict[str, np.ndarray]) -> None:
        dtype = np.dtype([(name, x.dtype, x.shape[1:]) for name, x in arrays.items()])
        size = rows * dtype.itemsize
        if size > self.most:
            return
        if not file.tell():
            self._make_room(size)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
            np.lib.format.write_array_header_1_0(file, header)
        table = np.zeros(len(arrays[VECTORS]), dtype)
        for name, x in arrays.items():
            table[name] = x
        file.write(table.tobytes())

    def _make_room(self, size: int) -> None:
        """Drops the files that were used longest ago, until `size` more bytes fit."""
        files = []
        for path in filter(lambda path: OURS.fullmatch(path.name), self.folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                stat = path.stat()
                unfinished = path.name.startswith(".")
                if unfinished and time.time() - stat.st_mtime > STALE:
                    path.unlink()
                elif not unfinished:
                    files.append((stat.st_mtime, stat.st_size, path))
        held = sum(nbytes for _, nbytes, _ in files)
        for _, nbytes, path in sorted(files):
            if held + size <= self.most:
                break
            path.unlink(missing_ok=True)
            held -= nbytes

    def _path(self, name: str, identity: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        shown = re.sub(r"[^\w.]+", "-", name, flags=re.ASCII)[-60:].strip("-.")
        return self.folder / f"{shown}-{digest}.npy"


def checksum(params: Any, mesh: Mesh) -> str:
    """Of weights, bit by bit, the same on every mesh: sums of integers don't depend on how the weights are sharded."""
    sums = jax.jit(lambda params: jax.tree.map(_sum, params), out_shardings=NamedSharding(mesh, P()))(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = [
        (jax.tree_util.keystr(path), x.shape, str(x.dtype), np.asarray(found).tolist())
        for (path, x), found in zip(leaves, jax.tree.leaves(sums), strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _sum(x: Array) -> UInt[Array, " 2"]:
    """Two sums, modulo 2^32, over all numbers of an array, each mixed with its place."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    mixed = _mix(bits + _mix(place + jnp.uint32(0x9E3779B9)))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), _mix(mixed ^ jnp.uint32(0x85EBCA6B)).sum(dtype=jnp.uint32)])


def _mix(x: UInt[Array, " *n"]) -> UInt[Array, " *n"]:
    """MurmurHash3's last step: every bit of the input changes half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
