"""Compare and swap of local files; tests/test_remote.py has the stores."""

import errno
import os
import threading

import pytest

from clipjax import swap


@pytest.fixture(params=["hard links", "none"])
def path(request, tmp_path, monkeypatch):
    """A file that does not exist yet, on a file system with or without hard links."""
    if request.param == "none":

        def refuse(*_):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    return tmp_path / "new" / "file.json"


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_only_the_version_that_was_read_is_replaced(path):
    assert swap.read(path) is None
    one = swap.swap(path, None, b"one")
    assert swap.swap(path, None, b"late") is None
    two = swap.swap(path, one, b"two")
    assert path.read_bytes() == b"two"
    assert swap.read(path) == two
    assert swap.swap(path, one, b"late") is None
    assert swap.swap(path, two, b"two") == two  # nothing new
    assert swap.swap(path, two, b"three") == swap.read(path)
    assert path.read_bytes() == b"three"
    assert names(path) == ["file.json"]
    swap.remove(path)
    swap.remove(path)
    assert names(path) == []
    assert swap.swap(path, two, b"late") is None
    assert names(path) == []


def test_of_several_exactly_one_succeeds(path):
    before, won = None, []
    for round in range(5):
        gate = threading.Barrier(6)

        def attempt(content, before=before, gate=gate):
            gate.wait()
            if swap.swap(path, before, content):
                won.append(content)

        threads = [threading.Thread(target=attempt, args=(f"{round} {n}".encode(),)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == round + 1
        before = swap.read(path)
        assert path.read_bytes() == before.content == won[-1]
        assert names(path) == ["file.json"]


def test_a_program_may_die_in_between(path, monkeypatch):
    """Its new content is there already, and counts. So does that of one who goes on from it and dies in turn."""
    versions = [swap.swap(path, None, b"one")]

    def die(*_):
        raise SystemExit

    for content in (b"two", b"three"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(SystemExit):
                swap.swap(path, versions[-1], content)
        assert swap.read(path).content == content
        assert path.read_bytes() == b"one"
        assert swap.swap(path, versions[-1], b"late") is None
        versions.append(swap.read(path))
    swap.swap(path, versions[-1], b"four")
    assert path.read_bytes() == b"four"
    assert names(path) == ["file.json"]


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        swap.swap(tmp_path / "file" / "file.json", None, b"one")
