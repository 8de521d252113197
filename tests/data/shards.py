"""Tars for tests, written by webdataset's own writer in img2dataset's layout, or by hand."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def jpeg(i: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A noisy image whose mean red is 4 (i mod 64)."""
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 4 * (i % 64)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg", quality=95)
    return out.getvalue()


def img2dataset(folder: Path, shards: int = 3, samples: int = 10) -> Path:
    """A folder as img2dataset leaves it: numbered shards of .jpg, .json and .txt, a parquet and a json beside each.

    The caption of number i is `number i`; its json has an `alt` and a `similarity` of i / 100. Every seventh has no caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for i in range(shard * samples, (shard + 1) * samples):
                about = {"caption": f"number {i}", "alt": [f"alt {i}"], "similarity": i / 100, "key": f"{shard:05}{i:04}"}
                sample = {"__key__": about["key"], "jpg": jpeg(i), "json": json.dumps(about)}
                writer.write(sample | ({} if i % 7 == 6 else {"txt": f"number {i}"}))
        (folder / f"{shard:05}_stats.json").write_text("{}")
        (folder / f"{shard:05}.parquet").write_bytes(b"PAR1")
    return folder


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def benchmark(root: Path, samples: Iterable[tuple[bytes, int | str | np.ndarray]], *, split: str = "test", **files: str) -> Path:
    """A set as CLIP_benchmark's webdataset_builder.py exports it, without the packages that it needs: samples of an image in
    webp and a class, captions or labels, ten a shard. `files`: beside the folder of the split, as `classnames`."""
    for name, text in files.items():
        (root / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.txt").write_text(text)
    (root / split).mkdir(parents=True)
    with webdataset.ShardWriter(str(root / split / "%d.tar"), maxcount=10, verbose=0) as sink:
        for i, (image, about) in enumerate(samples):
            kind = {int: "cls", str: "txt", np.ndarray: "npy"}[type(about)]
            sink.write({"__key__": f"s{i:07}", "webp": image, kind: about})
        shards = sink.shard
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    return root
