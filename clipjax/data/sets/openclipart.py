"""`clipjax data prepare openclipart`: 5,409 drawings of the Open Clip Art Library with their titles, keywords and descriptions.

They come from Debian's packages openclipart-png and openclipart-svg. The drawings are in the public domain.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shutil import which

from clipjax.config import ConfigError, require
from clipjax.data.sets.drawings import TEST_PERCENT, Drawing, drawings
from clipjax.data.sets.publish import Row, write_parquet, write_tars
from clipjax.files import local_path

FOLDER_VARIABLE = "CLIPJAX_OPENCLIPART"
INSTALLED = Path("/usr/share/openclipart")
PACKAGES = ("openclipart-png", "openclipart-svg")
CARD = "README.md"
RELEASE = "0.18"
NEXT = """As webdataset shards, and the same as parquet (parquet:{folder}/parquet, with --split train or test):

  clipjax data inspect 'wds:{folder}/wds/train-*.tar'
  clipjax train openclipart_clip --workdir runs/openclipart --data.spec 'wds:{folder}/wds/train-*.tar'
  clipjax eval retrieval runs/openclipart --data 'wds:{folder}/wds/test-*.tar'"""


def prepare_openclipart(folder: Path) -> str:
    """Writes the dataset to `folder`, unless it is there: webdataset shards in `wds`, the same as parquet in `parquet`, and
    README.md, whose text this returns. The folder, a local one that is new or empty, appears complete or not at all.

    Raises ConfigError for a folder of other things, and as `find_collection` does."""
    card = folder / CARD
    if card.is_file() and (folder / "wds").is_dir() and (folder / "parquet").is_dir():
        return card.read_text(encoding="utf-8")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "--out", str(folder), "holds other things: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=folder.parent) as scratch:
        built = Path(scratch, "built")
        taken, left_out = drawings(find_collection(Path(scratch).absolute()))
        taken.sort(key=lambda d: hashlib.sha256(d.key.encode()).digest())  # else a shard would hold flags alone
        splits = {split: [_row(d) for d in taken if d.test == (split == "test")] for split in ("train", "test")}
        write_tars(built / "wds", splits)
        write_parquet(built / "parquet", splits)
        text = _card({split: len(rows) for split, rows in splits.items()}, left_out)
        (built / CARD).write_text(text, encoding="utf-8")
        built.chmod(0o755)
        built.replace(folder)  # an empty folder gives way
    return text


def find_collection(scratch: Path) -> Path:
    """The folder that holds `png` and `svg`: the one that CLIPJAX_OPENCLIPART names, else that of the installed packages. Else
    the packages are downloaded to `scratch` and unpacked, without being root. Raises ConfigError, with what to do by hand."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        folder = local_path(FOLDER_VARIABLE, chosen).expanduser()
        if not _complete(folder):
            raise ConfigError(f"{FOLDER_VARIABLE} = {chosen!r}: must be the packages' {INSTALLED}, with folders png and svg")
        return folder
    if _complete(INSTALLED):
        return INSTALLED
    if not (which("apt-get") and which("dpkg-deb")):
        pages = " and ".join(f"https://packages.debian.org/{name}" for name in PACKAGES)
        remedy = f"download both .deb files from {pages}, unpack each (`ar x FILE.deb && tar -xf data.tar.xz`)"
        raise ConfigError(f"openclipart: there is no apt-get: {remedy}, and set {FOLDER_VARIABLE} to their .{INSTALLED}")
    print(f"openclipart: downloads {' and '.join(PACKAGES)}, 156 MB", file=sys.stderr, flush=True)
    _run(["apt-get", "-q", "download", *PACKAGES], scratch)
    for package in sorted(scratch.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked" / INSTALLED.relative_to("/")


def _complete(folder: Path) -> bool:
    return (folder / "png").is_dir() and (folder / "svg").is_dir()


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        remedy = f"`apt-get update`, or install {' and '.join(PACKAGES)}, or set {FOLDER_VARIABLE}"
        raise ConfigError(f"openclipart: `{' '.join(command)}` failed ({said[-1]}): {remedy}")


def _row(drawing: Drawing) -> Row:
    """With all that is known of it."""
    known = asdict(drawing.metadata)
    return Row(drawing.key, drawing.png, drawing.captions, known | {"keywords": list(drawing.metadata.keywords)})


def _card(examples: Mapping[str, int], left_out: Counter[str]) -> str:
    """README.md: what the folder holds. Its head is for the Hugging Face hub."""
    missing = "; ".join(f"{n:,} {reason}" for reason, n in left_out.most_common())
    held_out = 100 - TEST_PERCENT
    return f"""---
license: other
license_name: public-domain
configs:
- config_name: default
  data_files:
  - {{split: train, path: parquet/train-*}}
  - {{split: test, path: parquet/test-*}}
---
# openclipart: drawings with titles, keywords and descriptions

{sum(examples.values()):,} drawings of the Open Clip Art Library: {examples["train"]:,} train, {examples["test"]:,} test.

- Source: Debian's packages {" and ".join(PACKAGES)}, the last release of the library ({RELEASE}).
- Licence: public domain, as the metadata of each drawing says (`licence`, `creator`).
- Captions: what it is; that with its keywords; its description (`captions`; the first is `caption`, or KEY.txt).
- Split: test if crc32(key) mod 100 is {held_out} or more, as `#{held_out}-100` of any source; both may hold versions of one.
- Left out: {missing or "none"}.
"""
