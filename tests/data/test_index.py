"""The index of tars: made once, resumed and shared; what is stale, cut, compressed or missing is named; places; remote sets."""

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest

from clipjax import cli
from clipjax.config import ConfigError
from clipjax.data import bar
from clipjax.data.formats import index, indexing, spans
from clipjax.data.formats.index import open_index
from clipjax.data.storage import ranges
from tests import stores
from tests.data import http_server, hub, shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/clipjax/index"


@pytest.fixture
def folder(tmp_path):
    return shards.img2dataset(tmp_path / "set")


@pytest.fixture
def scanned(monkeypatch):
    """The shards that this process scans."""
    names = []

    def scan(shard, progress):
        names.append(os.path.basename(shard.url))
        return spans.scan(shard, progress)

    monkeypatch.setattr(indexing, "scan", scan)
    return names


def opened(patterns, folder=None):
    return open_index(f"wds:{patterns}", str(patterns), folder)


def same(a, b):
    return (a.spans == b.spans).all() and (a.buckets == b.buckets).all() and (a.version, a.suffixes) == (b.version, b.suffixes)


def test_the_command_tells_what_there_is(folder, capsys):
    assert cli.main(["data", "index", f"wds:{folder}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["30 samples in 3 shards; suffixes: jpg 30, json 30, txt 26", f"index: {folder}/clipjax-index"]
    assert sorted(path.name for path in (folder / "clipjax-index").iterdir()) == ["buckets.npy", "index.json", "spans.npy"]
    stored = json.loads((folder / "clipjax-index/index.json").read_text())
    assert (stored["spec"], stored["samples"]) == (f"wds:{folder}", 30)
    shard = stored["shards"][1]
    assert (shard["name"], shard["samples"], shard["suffixes"]) == ("00001.tar", 10, {"jpg": 10, "json": 10, "txt": 9})
    assert (shard["size"], shard["tag"]) == ((stat := (folder / "00001.tar").stat()).st_size, str(stat.st_mtime_ns))


def test_an_index_is_made_once_and_opened_as_arrays_on_disk(folder, scanned, capsys):
    one = opened(folder)
    assert sorted(scanned) == ["00000.tar", "00001.tar", "00002.tar"]
    assert one.starts.tolist() == [0, 10, 20, 30]
    keys = [f"{i // 10:05}{i:04}" for i in range(30)]
    assert one.buckets.tolist() == [zlib.crc32(key.encode()) % 100 for key in keys]
    assert same(one, opened(folder))
    assert same(one, opened(f"{folder}/"))
    assert len(scanned) == 3
    again = pickle.loads(pickle.dumps(one))
    assert same(one, again)
    assert len(pickle.dumps(one)) < 2000
    assert isinstance(again.spans.base, np.memmap)
    assert capsys.readouterr().err == ""  # short work is quiet


def test_places(folder, cache, tmp_path, monkeypatch):
    few = f"{folder}/{{00000..00001}}.tar"
    assert len(opened(few)) == 20
    names = sorted(path.name for path in folder.glob("clipjax-index*"))
    assert len(names) == 1
    assert names[0].startswith("clipjax-index-")
    assert len(opened(folder)) == 30
    folder.rename(tmp_path / "moved")  # with its index, which is of other times of modification only if copied
    monkeypatch.setattr(indexing, "build", None)
    assert len(opened(tmp_path / "moved")) == 30
    monkeypatch.chdir(tmp_path / "moved")
    assert len(opened("{00000..00001}.tar")) == len(opened("./{00000..00001}.tar")) == 20
    assert not cache.exists()


def test_the_cache_and_a_folder_of_ones_own(folder, cache, tmp_path, monkeypatch, capsys):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(folder) and access(path, mode))
    assert len(opened(folder)) == 30
    assert [path.name for path in cache.glob("*/*.json")] == ["index.json"]
    assert not list(folder.glob("clipjax-index*"))
    assert cli.main(["data", "index", f"wds:{folder}", "--out", str(tmp_path / "own")]) == 0
    assert f"(train with data.index = '{tmp_path}/own')" in capsys.readouterr().out
    monkeypatch.setattr(indexing, "build", None)
    assert len(opened(folder, str(tmp_path / "own"))) == 30


def test_a_stale_index_is_refused_and_only_what_changed_is_read_again(folder, scanned, capsys):
    one = opened(folder)
    shards.write_tar(folder / "00001.tar", [("new.jpg", b"x"), ("new.txt", b"y")])
    (folder / "00000.tar").rename(folder / "00009.tar")
    message = r"index in .*/clipjax-index is stale: 00001.tar has changed since, 00000.tar is missing: bring it back, or index wi"
    with pytest.raises(
        ConfigError, match=rf"data.spec = 'wds:{folder}': its {message}.*, 00009.tar is new; `clipjax data index '"
    ):
        opened(folder)
    scanned.clear()
    assert cli.main(["data", "index", f"wds:{folder}"]) == 0
    assert sorted(scanned) == ["00001.tar", "00009.tar"]
    two = opened(folder)
    assert two.starts.tolist() == [0, 1, 11, 21]
    assert (two.spans[1:11] == one.spans[20:]).all()
    assert (two.spans[11:] == one.spans[:10]).all()
    assert one.version != two.version


def test_a_copy_with_other_times_is_told_apart_from_a_change(folder):
    opened(folder)
    os.utime(folder / "00002.tar", (1, 1))
    with pytest.raises(ConfigError, match=r"00002.tar has the same size, but another time or ETag \(cp -p and rsync"):
        opened(folder)


def test_broken_shards_are_named_and_the_others_kept(folder, scanned):
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "00002.tar").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            opened(folder)
        said = str(caught.value)
        assert f"data.spec = 'wds:{folder}': 2 of 3 shards are no whole tars (the others are indexed): {folder}/00001.tar" in said
        assert "it is cut; fetch it again" in said
        assert f"{folder}/00002.tar ends at byte 0" in said
    assert len(scanned) == 3
    (folder / "00001.tar").write_bytes(whole)
    (folder / "00002.tar").unlink()
    assert len(opened(folder)) == 20
    assert scanned[3:] == ["00001.tar"]


def test_compressed_and_missing_shards_are_named(folder, capsys):
    (folder / "00003.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ConfigError, match=r"00003.tar.gz is compressed; unpack it with gunzip first"):
        opened(folder)
    (folder / "00003.tar.gz").rename(folder / "00003.tar")
    with pytest.raises(ConfigError, match=r"00003.tar is no tar: it is compressed: unpack it with gunzip"):
        opened(folder)
    with pytest.raises(ConfigError, match=r"00004.tar does not exist, one of 2 such names"):
        opened(f"{folder}/{{00000..00005}}.tar")
    assert cli.main(["data", "index", "tsv:a.tsv"]) == 2
    assert "only tars need an index; give wds:SHARDS" in capsys.readouterr().err


def test_what_is_left_out_is_counted(tmp_path):
    files = [
        ("a.jpg", b"x"),
        ("a.txt", b"a"),
        ("b.txt", b"b"),
        ("c.png", b"x"),
        ("d.jpg", b"x"),
        ("e.jpg", b"x"),
        ("d.txt", b"d"),
    ]
    path = shards.write_tar(tmp_path / "0.tar", [*files, ("readme", b"x"), ("x/.DS_Store", b"x"), ("f.seg.PNG", b"x")])
    made = opened(path)
    assert (len(made), made.dropped) == (4, {"no image": 1, "apart": 2})
    assert made.suffixes == {"jpg": 2, "txt": 1, "png": 1, "seg.png": 1}
    names = [f"{n}.{suffix}" for suffix in ("jpg", "txt") for n in range(5)]
    shards.write_tar(tmp_path / "1.tar", [(name, b"") for name in names])
    with pytest.raises(ConfigError, match=r"1.tar has 10 runs of members, of 10, whose key comes again.*tar --sort=name"):
        opened(tmp_path / "1.tar")


def test_large_samples_and_endless_suffixes(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "LARGEST", 4096)
    many = [(f"{n}.{n}.jpg", b"x" * (5000 if n == 7 else 10)) for n in range(300)]
    made = opened(shards.write_tar(tmp_path / "0.tar", many))
    assert (len(made), made.dropped, len(made.suffixes)) == (299, {"above 0 MiB": 1}, 100)


def test_damaged_indices_are_named(folder):
    opened(folder)
    place = folder / "clipjax-index"
    (place / "spans.npy").write_bytes((place / "spans.npy").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=rf"{place}: is no whole index \(.*\); remove it, and index the data again"):
        opened(folder)
    (place / "index.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"{place}/index.json: is no index \(.*\); remove it"):
        opened(folder)
    (place / "index.json").write_text('{"format": 9}')
    with pytest.raises(ConfigError, match=r"is of format 9, this clipjax reads 1"):
        opened(folder)


def test_an_interrupted_index_goes_on(folder, scanned, monkeypatch, capsys):
    real, count = indexing.scan, itertools.count()

    def failing(shard, progress):
        if next(count) == 1:
            raise OSError("the disk is gone")
        return real(shard, progress)

    monkeypatch.setattr(bar, "DELAY", 0.0)
    monkeypatch.setattr(indexing, "AT_ONCE", 1)
    monkeypatch.setattr(indexing, "scan", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        opened(folder)
    assert len(list((folder / "clipjax-index/parts").glob("*.npz"))) >= 1
    assert len(opened(folder)) == 30
    assert scanned.count("00000.tar") == 1  # the others failed, or were stopped
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"index of wds:{folder}: ") for line in lines)
    assert "100%" in lines[-1]
    assert "B/s]" in lines[-1]


WORK = """
import os, sys, time
from clipjax.data.formats import indexing, spans

def scan(shard, progress):  # slower than it is, so that the processes meet
    time.sleep(0.1)
    with open(f"{sys.argv[3]}-{os.getpid()}", "a") as file:
        file.write(os.path.basename(shard.url) + chr(10))
    return spans.scan(shard, progress)

indexing.scan, indexing.AT_ONCE = scan, 2
indexing.index_command("wds:" + sys.argv[1], sys.argv[2])
"""


def test_processes_share_the_work(tmp_path):
    folder = shards.img2dataset(tmp_path / "set", shards=24, samples=2)
    place = str(tmp_path / "index")
    command = [sys.executable, "-c", WORK, str(folder), place, str(tmp_path / "names")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    made = [path.read_text().split() for path in tmp_path.glob("names-*")]
    assert len(made) in (1, 2)  # the second may come too late
    assert sorted(itertools.chain(*made)) == [f"{n:05}.tar" for n in range(24)]  # each once
    assert len(opened(folder, place)) == 48
    assert not (tmp_path / "index/parts").exists()


def test_what_others_claimed_and_never_made_is_made(folder, monkeypatch):
    """What a process of another host claimed, after some patience; of one that has died on this machine, at once."""
    monkeypatch.setattr(indexing, "POLL", 0.02)
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    for who, patience in ((f"{os.uname().nodename} {dead.pid}", 60.0), ("elsewhere 17", 0.2)):
        monkeypatch.setattr(indexing, "PATIENCE", patience)
        build = indexing._Build("wds:x", index.shards_of(str(folder)), str(folder), folder / "clipjax-index")
        build.parts.mkdir(parents=True)
        for key in build.keys[1:]:
            (build.parts / f"{key}.claim").write_text(who)
        assert len(opened(folder)) == 30
        shutil.rmtree(folder / "clipjax-index")


@pytest.fixture(params=["s3", "hf", "http"])
def remote(request, folder):
    """The set on a store of each kind, as patterns."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    if request.param == "http":
        with http_server.serving(folder) as server:
            yield f"{server.address}/{{00000..00002}}.tar"
    elif request.param == "hf":
        with hub.standing_in():
            for name, content in files.items():
                ranges.system("hf").pipe_file(f"hf://datasets/we/set/{name}", content)
            yield "hf://datasets/we/set"
    else:
        with stores.of_this_process(request.param):
            for name, content in files.items():
                fsspec.filesystem(request.param).pipe_file(f"{request.param}://{stores.BUCKET}/set/{name}", content)
            yield f"{request.param}://{stores.BUCKET}/set"
    ranges.forget()


def test_remote_sets(remote, folder, cache, monkeypatch, capsys, tmp_path):
    """A small one is indexed by itself, into the cache; of a large one the command is told. The same spans as of local files."""
    local = opened(folder, str(tmp_path / "local"))
    monkeypatch.setattr(index, "SMALL", 1000)
    what = r"has no index, and 0.0 GB in 3 shards are remote; `clipjax data index 'wds:"
    with pytest.raises(ConfigError, match=what):
        opened(remote)
    monkeypatch.setattr(index, "SMALL", 10**9)
    made = opened(remote)
    assert same(made, local)
    assert [path.name for path in cache.glob("*/*.json")] == ["index.json"]
    if remote.startswith("s3"):  # the command writes beside the shards, and every host copies that once
        assert cli.main(["data", "index", f"wds:{remote}"]) == 0
        assert f"index: {remote}/clipjax-index\n" in capsys.readouterr().out
        listed = fsspec.filesystem(remote[:2]).find(f"{remote}/clipjax-index")
        assert sorted(os.path.basename(name) for name in listed) == ["buckets.npy", "index.json", "spans.npy"]
        monkeypatch.setattr(indexing, "build", None)
        assert same(opened(remote), local)
        assert len(list(cache.glob("copy-*/*.npy"))) == 2
