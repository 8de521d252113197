"""Files that some runs of benchmarks/method_runs.py read: emoji's training pictures with other captions, and labels of them."""

import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from clipjax.config import Data
from clipjax.data.source import Record
from clipjax.data.sources import open_source

TONE = re.compile(r" ?\b(medium-light|medium-dark|light|medium|dark) skin tone")
PLAIN = "no skin tone"  # the second half of a name that has no skin tone
LABELS = 8  # words of a name that count as its labels, at most
COMMON = 5  # names in which such a word stands at least
WITHIN = {"skin", "tone"}  # words that tell nothing by themselves


def records(split: str = "train") -> Iterator[Record]:
    source = open_source(Data(spec="emoji", split=split))
    return (source.record(i) for i in range(len(source)))


def halves(name: str) -> tuple[str, str]:
    """A name without its skin tones, and these: `waving hand`, `dark skin tone`."""
    tones = [found.strip() for found in (match.group(0) for match in TONE.finditer(name))]
    return TONE.sub("", name).strip(), " ".join(tones) or PLAIN


def disrupted(name: str, other: str) -> str:
    """Its words in another order, or the words of another name where there is but one, or all are alike."""
    words = name.split()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(set(words)) > 1:
        for _ in range(20):
            shuffled = list(rng.permutation(words))
            if shuffled != words:
                return " ".join(shuffled)
    return other


def write_table(folder: Path, captions: Callable[[Record], list[str]], split: str = "train") -> None:
    """`folder`/SPLIT.tsv: the pictures of a split and their captions by `captions`; an empty list leaves an example out."""
    if (folder / f"{split}.tsv").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = ["filepath\ttitle"]
    for record in records(split):
        texts = captions(record)
        if texts:
            (folder / "images" / f"{record.key}.png").write_bytes(record.image)
            rows += [f"images/{record.key}.png\t{text}" for text in texts]
    (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")


def write_bases(folder: Path) -> None:
    """The held-out pictures with their names without skin tones: pictures of the same thing have the same caption."""
    write_table(folder, lambda record: [halves(record.captions[0])[0]], "test")


def write_halves(folder: Path) -> None:
    """Two captions a picture: what it shows, and its skin tones."""
    write_table(folder, lambda record: list(halves(record.captions[0])))


def write_disrupted(folder: Path) -> None:
    """Two captions a picture: its name, and the name disrupted."""
    names = [record.captions[0] for record in records()]
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    write_table(folder, lambda record: [record.captions[0], disrupted(record.captions[0], following[record.captions[0]])])


def write_thinned(folder: Path) -> None:
    """One in eight of the pictures with a skin tone, and all others."""
    kept = lambda record: not TONE.search(record.captions[0]) or zlib.crc32(record.key.encode()) % 8 == 1  # noqa: E731
    write_table(folder, lambda record: [record.captions[0]] if kept(record) else [])


def write_word_labels(file: Path) -> None:
    """The words of a picture's name that stand in several names, as its labels."""
    keys, names = zip(*((record.key, record.captions[0].lower().split()) for record in records()), strict=True)
    count: dict[str, int] = {}
    for words in names:
        for word in set(words):
            count[word] = count.get(word, 0) + 1
    numbers = {word: i for i, word in enumerate(sorted(word for word, n in count.items() if n >= COMMON and word not in WITHIN))}
    labels = np.full((len(names), LABELS), -1, np.int32)
    for row, words in zip(labels, names, strict=True):
        own = sorted({numbers[word] for word in words if word in numbers})[:LABELS]
        row[: len(own)] = own
    _save(file, keys, labels)


def write_base_labels(file: Path) -> int:
    """The number of the emoji without its skin tone. Returns how many there are."""
    keys, names = zip(*((record.key, halves(record.captions[0])[0]) for record in records()), strict=True)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    _save(file, keys, np.array([[numbers[name]] for name in names], np.int32))
    return len(numbers)


def _save(file: Path, keys: tuple[str, ...], labels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, key=np.array(keys), label=labels)
