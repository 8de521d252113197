"""A stand-in for hf:// in the memory of this process."""

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clipjax.data.storage import ranges


class Hub(MemoryFileSystem):
    """A stand-in for hf://: a file system that is not asynchronous, whose listings name a version."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))

    def ls(self, path, detail=True, **kwargs):
        if len(self._strip_protocol(path).strip("/").split("/")) < 3:
            raise ValueError(f"{path}: names no repository")
        found = super().ls(path, detail=True, **kwargs)
        found = [e | ({"blob_id": blob(self.store[e["name"]])} if e["type"] == "file" else {}) for e in found]
        return found if detail else [e["name"] for e in found]


def blob(file):
    return hashlib.sha1(file.getvalue()).hexdigest()


@contextmanager
def standing_in() -> Iterator[None]:
    """hf:// is an empty `Hub` in this process. `ranges.system("hf").pipe_file(URL, bytes)` puts a file there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Hub)
        Hub.store.clear()
        ranges.forget()
        yield
    ranges.forget()
