"""What is in a dataset: statistics and a contact sheet, to look at before hours go into training on it."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipjax import config
from clipjax.data.captions import caption_id
from clipjax.data.faults import shown
from clipjax.data.image import decode
from clipjax.data.sheet import Cell, contact_sheet
from clipjax.data.source import Record, Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.files import write_atomic

SAMPLE = 10_000  # examples that are read at most, evenly spread over the dataset
VOCABULARY = 8192  # of the tokenizer that is trained where none is given
GRID = 8  # images along each side of the sheet


def inspect(data: config.Data, tokenizer: Tokenizer | None, out_png: Path, *, length: int = 77) -> dict[str, Any]:
    """Statistics of a dataset, ready for JSON; writes a contact sheet of 8 x 8 images with their captions to `out_png`, if there
    are images that can be read.

    Sizes are in pixels; `tokens` count the special ones too. Without a tokenizer, a BPE is trained on the captions, and
    `truncated_share` is of captions longer than `length` tokens. Raises ConfigError as `open_source` does."""
    source = open_source(data)
    indices = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)).tolist()
    with ThreadPoolExecutor(data.workers) as pool:
        seen = list(pool.map(lambda i: _examine(source.record(i)), indices))
    captions = [c for record, _, _ in seen for c in record.captions]
    ids = Counter(caption_id(record.captions[0]) for record, _, _ in seen if record.captions)
    tokenizer = tokenizer or Tokenizer.train(captions, VOCABULARY, lowercase=True, length=length)
    bodies = [tokenizer.tokens(c) for c in captions]
    sizes = [size for _, size, _ in seen if size]
    report = {
        "dataset": source.name,
        "examples": len(source),
        "examples_looked_at": len(seen),
        "fields": source.fields,
        "classes": len(source.classnames) if source.classnames else 0,
        "width": _spread([w for w, _ in sizes]),
        "height": _spread([h for _, h in sizes]),
        "unreadable": {record.key: error for record, _, error in seen if error},
        "captions_per_example": _spread([len(record.captions) for record, _, _ in seen]),
        "sharing_a_caption": sum(n for n in ids.values() if n > 1),
        "words": _spread([len(c.split()) for c in captions]),
        "characters": _spread([len(c) for c in captions]),
        "tokens": _spread(bodies),
        "context_length": tokenizer.length,
        "vocabulary": tokenizer.vocab_size,
        "truncated_share": float(np.mean([n > tokenizer.length for n in bodies])) if bodies else 0.0,
        "samples": captions[:: max(1, len(captions) // 8)][:8],
    }
    readable = [i for i, (_, size, _) in zip(indices, seen, strict=True) if size]
    if readable:
        with write_atomic(out_png) as part:
            _contact_sheet(source, readable, f"{source.name}: {len(source):,} examples").save(part, "png")
    return report


def describe(report: dict[str, Any]) -> str:
    """The report of `inspect` as lines of text."""

    def spread(name: str) -> str:
        return "{min:,} to {max:,}, median {median:,}".format(**report[name]) if report[name] else "-"

    seen, unreadable = report["examples_looked_at"], report["unreadable"]
    part = "" if seen == report["examples"] else f" (the figures below are of {seen:,}, evenly spread)"
    rows = {
        "dataset": report["dataset"],
        "examples": f"{report['examples']:,}{part}",
        "fields": ", ".join(f"{name}: {kind}" for name, kind in report["fields"].items()),
        "class names": f"{report['classes']:,}",
        "width, pixels": spread("width"),
        "height, pixels": spread("height"),
        "unreadable": f"{len(unreadable):,}" + "".join(f"\n    {key}: {error}" for key, error in list(unreadable.items())[:10]),
        "captions each": spread("captions_per_example"),
        "sharing one": f"{report['sharing_a_caption']:,} have another's main caption, but for case, punctuation and spaces",
        "words": spread("words"),
        "characters": spread("characters"),
        "tokens": f"{spread('tokens')} (vocabulary {report['vocabulary']:,}, start and end included)",
        "truncated": f"{report['truncated_share']:.2%} of the captions at {report['context_length']} tokens",
        "samples": "".join(f"\n    {text}" for text in report["samples"]),
    }
    return "\n".join(f"{name:15} {value}" for name, value in rows.items())


def _examine(record: Record) -> tuple[Record, tuple[int, int] | None, str | None]:
    try:
        return record, decode(record.image).size, None
    except Exception as e:  # a decoder may raise anything
        return record, None, f"{type(e).__name__}: {e}"


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else {}


def _contact_sheet(source: Source, readable: list[int], title: str) -> Image.Image:
    """The same random images every time, so that two sheets can be compared."""
    chosen = np.random.default_rng(0).permutation(readable)[: GRID * GRID].tolist()
    cells = [Cell(x.image, [(text, "#333333") for text in x.record.captions[:1]]) for x in shown(source, chosen)]
    return contact_sheet(title, cells, GRID)
