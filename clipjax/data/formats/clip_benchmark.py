"""The layout in which CLIP_benchmark exports datasets as tars, which the sets of its hub and of DataComp have:

- `ROOT/SPLIT/0.tar`, `1.tar`, ..., and `ROOT/SPLIT/nshards.txt`, how many there are;
- `ROOT/classnames.txt`, of which line i is the name of class i, and `ROOT/zeroshot_classification_templates.txt`;
- `ROOT/dataset_type.txt`: `retrieval`, `multilabel`, or nothing for `classification`.

Source: clip_benchmark/webdataset_builder.py, which writes it, and build_wds_dataset in clip_benchmark/datasets/builder.py.
"""

import os
import posixpath
from dataclasses import dataclass

from clipjax.config import ConfigError, require
from clipjax.data.formats.index import ABSENT
from clipjax.data.formats.locations import SPLITS
from clipjax.data.storage.ranges import read

COUNT, KIND = "nshards.txt", "dataset_type.txt"
CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class Facts:
    """What stands beside the tars, or above the folder of their split."""

    classnames: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    kind: str | None  # None: the set is not of this layout


def facts_of(shard: str, split: str | None = None) -> Facts:
    """The facts of the set that a shard is of. `split`: its folder is that of this split, however it is called."""
    folder = posixpath.dirname(shard)
    above = [posixpath.dirname(folder)] if posixpath.basename(folder) in {*SPLITS, split} else []

    def lines(name: str) -> tuple[str, ...] | None:
        texts = (_text(place, name) for place in (folder, *above))
        found = next((text for text in texts if text is not None), None)
        return None if found is None else tuple(line.strip() for line in found.rstrip().splitlines())

    kind, classnames = lines(KIND), lines(CLASSNAMES)
    return Facts(classnames, lines(TEMPLATES), kind[0].lower() if kind else "classification" if classnames else None)


def shards_of_split(patterns: str, split: str) -> str | None:
    """The patterns of the tars of a split, `patterns` being ROOT; None where it is no folder of this layout.

    It may also be the folder of a split, whose tars are those that nshards.txt counts, whatever `split` is of train and test.
    Raises ConfigError, with those that there are, for a split that ROOT does not have."""
    if any(sign in patterns for sign in ("*", "?", "[", "{", "::")) or patterns.endswith(".tar"):
        return None
    root = os.path.expanduser(patterns).rstrip("/")
    for folder in (posixpath.join(root, split), *([root] if split in ("train", "test") else [])):
        if (count := _text(folder, COUNT)) is not None:
            remedy = "must hold the number of the tars beside it; write it, or remove it"
            require(count.strip().isdecimal() and int(count) > 0, posixpath.join(folder, COUNT), count[:20], remedy)
            return posixpath.join(folder, f"{{0..{int(count) - 1}}}.tar")
    if os.path.isdir(posixpath.join(root, split)) and any(_text(root, name) is not None for name in (CLASSNAMES, KIND)):
        return posixpath.join(root, split)
    others = [name for name in sorted(SPLITS - {split}) if _text(posixpath.join(root, name), COUNT) is not None]
    require(not others, "data.split", split, f"{patterns} has {', '.join(others)}, by its folders with {COUNT}")
    return None


def _text(folder: str, name: str) -> str | None:
    """The text of a file; None: it is not there."""
    try:
        return read(posixpath.join(folder, name)).decode("utf-8-sig")
    except ABSENT:
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{posixpath.join(folder, name)}: is not UTF-8 text: convert it") from error
