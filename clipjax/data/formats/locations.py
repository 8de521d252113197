"""Where the files of a dataset lie: the folder that they share, the images beside them, and the splits in their names."""

import itertools
import re
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from clipjax.config import ConfigError
from clipjax.data.formats.sample import IMAGES, TEXTS
from clipjax.data.storage import store
from clipjax.data.storage.store import Stored

PARQUET = (".parquet", ".pq")
BESIDE = (*TEXTS, "json", "cls")  # suffixes of what may stand beside an image
FOLDER = tuple(f".{suffix}" for suffix in sorted(IMAGES | set(BESIDE)))
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
SPLITS = {"train", "test", "validation", *ALIASES}
NAMED = re.compile(r"(train|test|validation|valid|val|dev)[-_.]?\d*")  # a folder, or the name of a file
NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]{8,})?")  # a file of the Hugging Face hub


def name_of(url: str) -> str:
    """The name of a file, without its folder."""
    return url.rpartition("/")[2]


def common_folder(urls: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all files are in, and the way from there to the folder of each. Each is empty or ends with a slash."""
    parts = [url.split("/")[:-1] for url in urls]
    shared = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))]
    root, *inner = ("".join(f"{part}/" for part in several) for several in (shared, *(part[len(shared) :] for part in parts)))
    return root, inner


def image_at(folder: str, path: str) -> bytes | Path:
    """The image of a path: relative to a folder that is empty or ends with a slash, absolute, or a URL. A remote one is read."""
    if store.scheme_of(path):
        return store.read(path)
    if store.scheme_of(folder) and not path.startswith("/"):
        return store.read(folder + path)
    return Path(folder) / path


def key_of(path: str, folder: str) -> str:
    """The key of an image with this path, in a table of this folder of several. Absolute paths and URLs are keys themselves."""
    return path if path.startswith("/") or store.scheme_of(path) else folder + path


def split_of(url: str) -> str | None:
    """The split by which a file or its folder is called: `train-00000-of-00012.parquet`, `test.parquet`, `val/0000.parquet`."""
    *_, folder, name = ["", *url.split("/")]
    stem = name.partition(".")[0]
    if numbered := NUMBERED.fullmatch(stem):
        return _full(numbered[1])
    found = NAMED.fullmatch(stem) or NAMED.fullmatch(folder)
    return _full(found[1]) if found else None


def in_split(files: Sequence[Stored], spec: str, split: str) -> list[Stored]:
    """The files of a split, where any are called by splits; else all, which may be called train or test.

    Raises ConfigError, with those that there are, for another split."""
    splits = [split_of(file.url) for file in files]
    known = sorted({name for name in splits if name})
    if not known:
        remedy = f"the files of {spec} are not called by splits; leave it out, or take shares, as train#0-95 and train#95-100"
        if split not in ("train", "test"):
            raise ConfigError(f"data.split = {split!r}: {remedy}")
        return list(files)
    if _full(split) not in known:
        raise ConfigError(f"data.split = {split!r}: {spec} has {', '.join(known)}, by the names of its files")
    return [file for file, name in zip(files, splits, strict=True) if name == _full(split)]


def divided(spec: str) -> bool:
    """Whether the names of files or sub-folders of a `parquet:` or `folder:` divide it into splits. Lists them."""
    kind, _, patterns = spec.partition(":")
    if kind == "parquet":
        return any(split_of(file.url) for file in store.find("data.spec", patterns, PARQUET, spec))
    root, files = root_of(patterns), store.find("data.spec", patterns, FOLDER, spec)
    return _are_splits(_sub_folders(root, files))


def root_of(patterns: str) -> str:
    """The folder that all patterns are in, with a slash at its end: of one with wildcards or braces, what comes before them."""
    folders = []
    for pattern in map(expanduser, patterns.split("::")):
        literal = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
        folders.append(literal.rstrip("/") + "/" if literal == pattern else literal)
    return common_folder(folders)[0]


def in_split_folder(root: str, files: Sequence[Stored], spec: str, split: str) -> tuple[str, list[Stored]]:
    """Those of the files below `root` that are in the sub-folder of a split, and that folder with a slash at its end; all, if not
    all sub-folders are called by splits. Raises ConfigError, with those that there are, for another split."""
    folders = _sub_folders(root, files)
    known = {_full(folder): folder for folder in folders}
    if not _are_splits(folders):
        remedy = f"the sub-folders of {spec} are no splits; leave it out, or take shares, as train#0-95 and train#95-100"
        if split not in ("train", "test"):
            raise ConfigError(f"data.split = {split!r}: {remedy}")
        return root, list(files)
    if _full(split) not in known:
        raise ConfigError(f"data.split = {split!r}: {spec} has {', '.join(sorted(known))}, by its sub-folders")
    inner = f"{root}{known[_full(split)]}/"
    return inner, [file for file in files if file.url.startswith(inner)]


def _sub_folders(root: str, files: Sequence[Stored]) -> set[str]:
    return {path.partition("/")[0] for file in files if "/" in (path := file.url.removeprefix(root))}


def _are_splits(folders: set[str]) -> bool:
    return bool(folders) and folders <= SPLITS


def _full(split: str) -> str:
    return ALIASES.get(split, split)
