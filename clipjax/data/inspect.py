"""What is in a dataset: statistics and a contact sheet, to look at before hours go into training on it."""

import html
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipjax import config
from clipjax.data.bar import bar
from clipjax.data.captions import caption_id
from clipjax.data.clean import clean
from clipjax.data.faults import shown
from clipjax.data.images.facts import KINDS, Facts, facts_of
from clipjax.data.images.sheet import Cell, contact_sheet
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.files import write_atomic

SAMPLE = 10_000  # examples that are read at most, evenly spread over the dataset
VOCABULARY = 8192  # of the tokenizer that is trained where none is given
GRID = 8  # images along each side of the sheet
NAMED = 10  # examples of a kind whose keys are told


@dataclass(frozen=True)
class Seen:
    """What is kept of an example: not its image."""

    key: str
    captions: tuple[str, ...]
    facts: Facts | None
    error: str | None  # why the image can't be read


def inspect(data: config.Data, tokenizer: Tokenizer | None, out_png: Path, *, length: int = 77) -> dict[str, Any]:
    """Statistics of a dataset, ready for JSON; writes a contact sheet of 8 x 8 images with their captions to `out_png`, if there
    are images that can be read.

    Sizes are in pixels; `tokens` count the special ones too. Without a tokenizer, a BPE is trained on the captions, and
    `truncated_share` is of captions longer than `length` tokens. Raises ConfigError as `open_source` does."""
    source = open_source(data)
    indices = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)).tolist()
    with ThreadPoolExecutor(data.workers) as pool, bar(source.name, len(indices), "examples") as shown_bar:
        seen = []
        for example in pool.map(lambda i: _examine(source, i, data.max_pixels), indices):
            seen.append(example)
            shown_bar.update()
    readable = [x.facts for x in seen if x.facts]
    report = {
        "dataset": source.name,
        "examples": len(source),
        "examples_looked_at": len(seen),
        "fields": source.fields,
        "classes": len(source.classnames) if source.classnames else 0,
        "width": _spread([facts.width for facts in readable]),
        "height": _spread([facts.height for facts in readable]),
        "unreadable": {x.key: x.error for x in seen if x.error},
        **_kinds(seen),
        **_of_captions(seen, tokenizer, length),
    }
    if readable:
        title = f"{source.name}: {len(source):,} examples"
        numbers = [i for i, x in zip(indices, seen, strict=True) if x.facts]
        with write_atomic(out_png) as part:
            _contact_sheet(source, numbers, title).save(part, "png")
    return report


def _kinds(seen: list[Seen]) -> dict[str, Any]:
    """How many images are of each kind, and, under `first`, the keys of some of them."""
    same = Counter(x.facts.digest for x in seen if x.facts)
    keys: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for x in seen:
        for kind in x.facts.kinds if x.facts else ():
            keys[kind].append(x.key)
        if x.facts and same[x.facts.digest] > 1:
            keys["repeated"].append(x.key)
    return {kind: len(of_kind) for kind, of_kind in keys.items()} | {"first": {k: v[:NAMED] for k, v in keys.items() if v}}


def _of_captions(seen: list[Seen], tokenizer: Tokenizer | None, length: int) -> dict[str, Any]:
    captions = [c for x in seen for c in x.captions]
    ids = Counter(caption_id(x.captions[0]) for x in seen if x.captions)
    tokenizer = tokenizer or Tokenizer.train(captions, VOCABULARY, lowercase=True, length=length)
    bodies = [tokenizer.tokens(c) for c in captions]
    return {
        "captions_per_example": _spread([len(x.captions) for x in seen]),
        "without_caption": sum(not x.captions for x in seen),
        "with_entities": sum(html.unescape(c) != c for c in captions),
        "changed_by_web": sum(clean(c, "web") != " ".join(c.split()) for c in captions),
        "naming_special_tokens": sum(map(tokenizer.names_special, captions)),
        "sharing_a_caption": sum(n for n in ids.values() if n > 1),
        "words": _spread([len(c.split()) for c in captions]),
        "characters": _spread([len(c) for c in captions]),
        "tokens": _spread(bodies),
        "context_length": tokenizer.length,
        "vocabulary": tokenizer.vocab_size,
        "truncated_share": float(np.mean([n > tokenizer.length for n in bodies])) if bodies else 0.0,
        "samples": captions[:: max(1, len(captions) // 8)][:8],
    }


def describe(report: dict[str, Any]) -> str:
    """The report of `inspect` as lines of text."""

    def spread(name: str) -> str:
        return "{min:,} to {max:,}, median {median:,}".format(**report[name]) if report[name] else "-"

    def named(kind: str) -> str:
        keys = report["first"].get(kind, [])
        return f": {', '.join(keys)}{', ...' if report[kind] > len(keys) else ''}" if keys else ""

    seen, unreadable = report["examples_looked_at"], report["unreadable"]
    first = list(unreadable.items())[:NAMED]
    part = "" if seen == report["examples"] else f" (the figures below are of {seen:,}, evenly spread)"
    rows = {
        "dataset": report["dataset"],
        "examples": f"{report['examples']:,}{part}",
        "fields": ", ".join(f"{name}: {kind}" for name, kind in report["fields"].items()),
        "class names": f"{report['classes']:,}",
        "width, pixels": spread("width"),
        "height, pixels": spread("height"),
        "unreadable": "".join([f"{len(unreadable):,}", *(f"\n    {key}: {error}" for key, error in first)]),
        **{kind.replace("_", "-"): f"{report[kind]:,} {meaning}{named(kind)}" for kind, meaning in KINDS.items()},
        "captions each": spread("captions_per_example"),
        "no caption": f"{report['without_caption']:,} have none with a visible character",
        "entities": f"{report['with_entities']:,} captions have HTML entities; {report['changed_by_web']:,} change by "
        "tokenizer.clean=web, apart from white space",
        "special tokens": f"{report['naming_special_tokens']:,} captions have the string of one, which is text to clipjax",
        "sharing one": f"{report['sharing_a_caption']:,} have another's main caption, but for case, punctuation and spaces",
        "words": spread("words"),
        "characters": spread("characters"),
        "tokens": f"{spread('tokens')} (vocabulary {report['vocabulary']:,}, start and end included)",
        "truncated": f"{report['truncated_share']:.2%} of the captions at {report['context_length']} tokens",
        "samples": "".join(f"\n    {text}" for text in report["samples"]),
    }
    return "\n".join(f"{name:15} {value}" for name, value in rows.items())


def _examine(source: Source, i: int, max_pixels: int) -> Seen:
    record = source.record(i)
    try:
        return Seen(record.key, record.captions, facts_of(record.image, max_pixels), None)
    except Exception as e:  # a decoder may raise anything
        return Seen(record.key, record.captions, None, f"{type(e).__name__}: {e}")


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else {}


def _contact_sheet(source: Source, readable: list[int], title: str) -> Image.Image:
    """The same random images every time, so that two sheets can be compared."""
    chosen = np.random.default_rng(0).permutation(readable)[: GRID * GRID].tolist()
    cells = [Cell(x.image, [(text, "#333333") for text in x.record.captions[:1]]) for x in shown(source, chosen)]
    return contact_sheet(title, cells, GRID)
