"""Which data these are: what a checkpoint remembers of a source, so that a run does not go on with other data unnoticed.

No image is decoded. A change of images alone, under the same keys and captions, is not seen.
"""

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clipjax.data.source import Source

SAMPLE = 1000  # examples that are looked at, evenly spread; of fewer, all
DISTANT = 100  # of a SPEC with an address, as gs://, where one may have to be fetched with its image
THREADS = 32  # that read them: on a distant storage each read waits for its answer
SAID = 60  # characters of a key in a message

Fingerprint = dict[str, Any]  # as JSON


def of(source: Source) -> Fingerprint:
    """The fingerprint of a source, which does not depend on where its files lie:

    - `name`, for messages only;
    - `examples`: how many;
    - `version`: what names this stored version, such as that of a TFDS dataset; empty where there is none;
    - `keys`, `captions`: of the examples `_sampled`, the CRC-32 of the key, and of all captions as a JSON list; None where an
      example could not be read, or has none;
    - of a mixture only: `parts`, the fingerprint of each; it has no samples of its own.
    """
    fingerprint: Fingerprint = {"name": source.name, "examples": len(source), "version": source.version}
    if source.sources:
        return fingerprint | {"parts": [of(part) for part in source.sources]}
    places = _sampled(len(source), DISTANT if "://" in source.name else SAMPLE)
    with ThreadPoolExecutor(THREADS) as pool:
        records = list(pool.map(source.text, places))
    keys = [None if record.key == f"number {i}" else _crc(record.key) for i, record in zip(places, records, strict=True)]
    texts = [_crc(json.dumps(record.captions)) if record.captions else None for record in records]
    return fingerprint | {"keys": keys, "captions": texts}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], source: Source) -> list[str]:
    """What differs between two fingerprints, a line each; nothing where it is the same data. `now` is of `source`.

    An example that could not be read is no difference."""
    parts, found = now.get("parts", ()), saved.get("parts", ())
    if len(parts) != len(found):
        return [f"parts: {len(found)} -> {len(parts)}"]
    lines = []
    for before, after, part in zip(found, parts, source.sources, strict=True):
        lines += [f"{after['name']}, {line}" for line in differences(before, after, part)]
    if parts:
        return lines
    if saved["examples"] != now["examples"]:
        lines.append(f"examples: {saved['examples']:,} -> {now['examples']:,}")
    else:  # with another number, the samples lie elsewhere
        lines += [line for what in ("keys", "captions") if (line := _unlike(what, saved, now, source))]
    if saved["version"] != now["version"]:
        lines.append(f"version: {saved['version'] or '(none)'} -> {now['version'] or '(none)'}")
    return lines


def _unlike(what: str, saved: Mapping[str, Any], now: Mapping[str, Any], source: Source) -> str:
    """How many of the sampled examples have another key, or other captions; empty if none has."""
    n, known = len(source), dict(zip(_sampled(len(source), len(saved[what])), saved[what], strict=True))
    pairs = [(i, known.get(i), crc) for i, crc in zip(_sampled(n, len(now[what])), now[what], strict=True)]
    changed = [i for i, before, after in pairs if None not in (before, after) and before != after]
    if not changed:
        return ""
    key = source.text(changed[0]).key
    key = key if len(key) <= SAID else f"{key[:SAID]}..."
    return (
        f"{what}: {len(changed):,} of {len(now[what]):,} examples have other ones; the first is number {changed[0]}, now {key!r}"
    )


def _sampled(n: int, most: int) -> list[int]:
    """The examples that are looked at, at most so many, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def _crc(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))
