"""A hundred thousand members of tars that are cut, swapped, foreign or bombs: nothing crashes, and each sample counts once."""

import io
import json
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clipjax import config
from clipjax.data.faults import usable
from clipjax.data.images import image
from clipjax.data.sources import open_source

SHARDS, SAMPLES = 4, 8400  # of 3 members each


def header(name: bytes, size: int) -> bytes:
    """tarfile takes three times as long for a hundred thousand."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, b"%011o\0" % size, b"0", b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one colour that says that it has this size."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = (b"IDAT", zlib.compress(bytes(1000)))
    packed = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in (head, *chunks, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pictures() -> list[bytes]:
    made = []
    for i, kind in enumerate(("jpeg", "png", "webp", "gif")):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(out, kind)
        made.append(out.getvalue())
    return made


BOMBS = [
    png(60_000, 60_000),
    png(1, 65_000_000),
    png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    b"[" * 100_000,
    b'{"caption":' * 50_000,
    b'{"caption": ' + b"9" * 5000 + b"}",
    b'{"caption": NaN, "caption": {"caption": []}}',
    "\u202e\u0000\ufeff".encode() * 5000,
    b"\xff\xfe" + "x".encode("utf-16") * 50,
    b"a " * (3 << 20),
    b"",
]


def changed(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    match int(rng.integers(5)):
        case 0:
            return content[: rng.integers(len(content))]
        case 1:
            return others[rng.integers(len(others))]
        case 2:
            return rng.bytes(int(rng.integers(300)))
        case 3:
            at = int(rng.integers(len(content)))
            return content[:at] + rng.bytes(4) + content[at + 4 :]
    return BOMBS[rng.integers(len(BOMBS))] if rng.random() < 0.2 else content[::-1]


def is_good(source, i, data):
    """As evaluations and training read: whatever is raised, the example is bad."""
    try:
        image.evaluation(usable(lambda: source.read(i), i).image, 8, data)
    except Exception:
        return False
    return True


@pytest.mark.slow
def test_fuzzed_members(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, whole = np.random.default_rng(0), pictures()
    intact, suffixes = [], (b"jpg", b"txt", b"json")
    for shard in range(SHARDS):
        with (tmp_path / f"{shard}.tar").open("wb") as file:
            for i in range(SAMPLES):
                picture = whole[i % len(whole)]
                contents = [picture, b"number %d" % i, json.dumps({"caption": f"json {i}", "key": i}).encode()]
                broken = rng.random(3) < 0.3
                intact.append(not broken.any())
                for suffix, content, fuzz in zip(suffixes, contents, broken, strict=True):
                    written = changed(content, contents, rng) if fuzz else content
                    file.write(header(b"%d-%05d.%s" % (shard, i, suffix), len(written)) + written + bytes(-len(written) % 512))
            file.write(bytes(1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = config.Data(spec=f"wds:{tmp_path}", text_field="txt=0.5,json.caption=0.5", split="test")
    source = open_source(data)
    assert len(source) == SHARDS * SAMPLES
    chunks, records = source.chunks(), []
    for chunk, count in enumerate(chunks):
        fetched = source.fetch(chunk)
        for j in range(count):
            try:
                records.append(source.record_in(fetched, chunk, j).captions)
            except Exception:  # as readers take it: a bad example
                records.append(())
    assert [record.captions for record in source.texts()] == records
    good = [is_good(source, i, data) for i in range(0, len(source), 4)]
    assert all(good[k] for k, whole_one in enumerate(intact[::4]) if whole_one)
    assert 0.35 < sum(good) / len(good) < 0.9
    assert sum(map(bool, records[::4])) >= sum(good)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kib < 400 * 1024
