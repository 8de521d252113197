"""Files found and read on this machine, on stores of every kind (see tests/stores.py), and on a web server that fails."""

import importlib.util
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from clipjax.config import ConfigError
from clipjax.data.storage import ranges, store
from tests import stores
from tests.data import http_server, hub

ROOT = Path(__file__).parents[2]
FILES = {f"set/{n:05}.tar": bytes([n]) * (1000 + n) for n in (8, 9, 10, 11)} | {
    "set/deep/00012.tar": b"deep",
    "set/notes.txt": b"about",
    "set/.hidden.tar": b"x",
}


@pytest.fixture(scope="module", params=["local", "gs", "s3", "hf"])
def place(request, tmp_path_factory):
    """A folder of each kind that holds FILES."""
    if request.param == "local":
        root = str(tmp_path_factory.mktemp("store"))
        for name, content in FILES.items():
            os.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
            with open(f"{root}/{name}", "wb") as file:
                file.write(content)
        yield root
    elif request.param == "hf":
        with hub.standing_in():
            root = "hf://datasets/we/pairs"
            for name, content in FILES.items():
                ranges.system("hf").pipe_file(f"{root}/{name}", content)
            yield root
    else:
        with stores.of_this_process(request.param):
            root = f"{request.param}://{stores.BUCKET}/some"
            for name, content in FILES.items():
                fsspec.filesystem(request.param).pipe_file(f"{root}/{name}", content)
            yield root


@pytest.fixture
def hasty(monkeypatch):
    """No second is waited between two tries."""
    monkeypatch.setattr(ranges, "DELAYS", (0.01,) * 4)


def names(found, place):
    return [file.url.removeprefix(f"{place}/set/") for file in found]


def test_braces_are_expanded_as_by_a_shell():
    assert store.expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert store.expand("{9..11}-{a,b}{}") == ["9-a{}", "9-b{}", "10-a{}", "10-b{}", "11-a{}", "11-b{}"]
    assert store.expand("{a,{b,c{1..2}}}/x") == ["a/x", "b/x", "c1/x", "c2/x"]
    assert len(store.expand("{00000..01242}.tar")) == 1243


def test_files_are_found(place):
    numbered = ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]
    found = store.find("data.spec", f"{place}/set/{{00008..00011}}.tar", (".tar",))
    assert names(found, place) == numbered
    assert [file.size for file in found] == [1008, 1009, 1010, 1011]
    assert all(file.tag for file in found)
    assert len({file.tag for file in found}) == 4
    assert names(store.find("data.spec", f"{place}/set", (".tar",)), place) == [*numbered, "deep/00012.tar"]
    assert names(store.find("data.spec", f"{place}/set/*", (".tar",)), place) == numbered
    assert names(store.find("data.spec", f"{place}/set/*.txt", (".tar",)), place) == ["notes.txt"]
    joined = store.find("data.spec", f"{place}/set/00010.tar::{place}/set/0000[89].tar", (".tar",))
    assert names(joined, place) == ["00010.tar", "00008.tar", "00009.tar"]


def test_a_whole_bucket_is_a_folder(place):
    if "://" in place:  # nothing above it can be listed
        root = place if place.startswith("hf") else place.rpartition("/")[0]
        assert len(store.find("data.spec", root, (".tar",))) == len(store.find("data.spec", f"{root}/", (".tar",))) == 5
        with pytest.raises(ConfigError, match=r"x\.y does not exist"):
            store.find("data.spec", f"{place.rpartition('/')[0]}/x.y", ())


def test_what_is_not_found_is_named(place):
    for patterns, message in {
        f"{place}/set/{{00007..00013}}.tar": r"00007.tar does not exist, one of 3 such names; check the path; a folder, or",
        f"{place}/none": "none does not exist",
        f"{place}/set/no*.txt::{place}/set/notes.txt": "names .*notes.txt twice; name each file once",
        f"{place}/set/*.zip": r"\.zip has no file that ends in",
        f"{place}/set::": "one of the names is empty",
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            store.find("data.spec", patterns, (".tar",))
        assert str(caught.value).startswith(f"data.spec = {patterns!r}: ")
    with pytest.raises(ConfigError, match=r"has no file that ends in \.csv; there are 6 others, such as .*/00008.tar"):
        store.find("data.spec", f"{place}/set", (".csv",))


def test_ranges_are_read(place):
    (found,) = store.find("data.spec", f"{place}/set/notes.txt", ())
    assert store.read(found.url) == b"about"
    assert store.read(found.url, 2) == b"out"
    assert store.read(found.url, 1, 3) == b"bou"
    assert store.read(found.url, 5, 0) == b""
    with store.open_file(found) as file:
        file.seek(-3, io.SEEK_END)
        assert file.read() == b"out"
    with pytest.raises(FileNotFoundError, match=r"none.tar"):
        store.read(f"{place}/set/none.tar", 0, 10)


def test_short_reads_are_noticed(place, hasty):
    with pytest.raises(OSError, match=r"notes.txt.*(3 bytes came instead of 9|ends at byte 5, before byte 11)|notes.txt"):
        store.read(f"{place}/set/notes.txt", 2, 9)


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"a")
    (tmp_path / "back").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/b.TAR").symlink_to(tmp_path / "a.tar")
    assert names(store.find("x", str(tmp_path), (".tar",)), tmp_path) == [f"{tmp_path}/a.tar", f"{tmp_path}/other/b.TAR"]


@pytest.fixture
def web(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.tar").write_bytes(bytes([n]) * 100_000)
    with http_server.serving(tmp_path) as server:
        yield server
    ranges.forget()


def test_a_web_server_is_asked_file_by_file(web):
    found = store.find("data.spec", f"{web.address}/{{0..2}}.tar", (".tar",))
    assert [(file.url[-5:], file.size) for file in found] == [("0.tar", 100_000), ("1.tar", 100_000), ("2.tar", 100_000)]
    assert len({file.tag for file in found}) >= 1
    assert sum(length for *_, length in web.asked) == 3
    with pytest.raises(ConfigError, match=r"3.tar does not exist, one of 2 such names"):
        store.find("data.spec", f"{web.address}/{{0..4}}.tar", (".tar",))
    with pytest.raises(ConfigError, match=r"can't be searched, because a web server lists no files: name its files, with braces"):
        store.find("data.spec", f"{web.address}/*.tar", (".tar",))
    web.ranges = False
    with pytest.raises(ConfigError, match=r"gives no ranges of files .*; copy the files to this machine"):
        store.find("data.spec", f"{web.address}/1.tar", (".tar",))


def test_a_failing_web_server_is_asked_again(web, hasty, monkeypatch):
    monkeypatch.setattr(ranges, "PATIENCE", 1.0)
    ranges.forget()
    url = f"{web.address}/1.tar"
    for fault in ("cut", "short", "500", "503", "slow", "silent"):
        web.faults.append(fault)
        assert store.read(url, 10, 50_000) == b"\1" * 50_000, fault
        assert not web.faults
    web.faults.extend(["503", "cut"])
    assert store.find("data.spec", url, ())[0].size == 100_000
    web.faults.extend(["500"] * 5)
    with pytest.raises(OSError, match=rf"{url}: .*500"):
        store.read(url, 0, 10)
    web.faults.append("403")
    with pytest.raises(PermissionError, match=rf"{url}: .*403"):
        store.read(url, 0, 10)
    assert not web.faults


FORKED = """
import os, sys
from clipjax.data.storage import store
assert store.read(sys.argv[1], 0, 3) == bytes([2] * 3)
child = os.fork()
if child == 0:
    os._exit(store.read(sys.argv[1], 0, 3) != bytes([2] * 3))
sys.exit(os.waitpid(child, 0)[1])
"""


def test_threads_and_forked_processes_read(web):
    """fsspec's event loop and connections are of one process; a forked child must make its own."""
    url = f"{web.address}/2.tar"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda start: store.read(url, start, 7), range(64))) == {b"\2" * 7}
    subprocess.run([sys.executable, "-c", FORKED, url], check=True, timeout=60, cwd=ROOT)


def test_unknown_stores_and_missing_extras_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"az://box/a: is neither on this machine nor on gs://, s3://, https:// or hf://"):
        store.find("data.spec", "az://box/a", ())
    look = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else look(name))
    ranges.forget()
    with pytest.raises(ConfigError, match=r"data.spec = 'hf://datasets/a/b': hf:// needs huggingface_hub, .* 'clipjax\[hf\]'"):
        store.find("data.spec", "hf://datasets/a/b", ())
