"""CPU time of cleaning a caption: in clipjax, as the normalizers of an exported tokenizer.json, and in open_clip if installed.

Run: python benchmarks/clean.py [--n 2000]

Microseconds a caption on one core, median of five. Seen on two busy cores: 0.6 for plain ASCII and 8 with entities (`web`); 120
to 190 as normalizers, which try some 620 patterns one after the other; 12 to 50 in open_clip.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from clipjax.data.clean import clean, normalizer

CAPTIONS = {
    "plain ASCII": "A photo of a red apple on a wooden table, next to two dogs",
    "entities": "A photo of Tom &amp; Jerry&#8217;s &quot;red apple&quot; on a wooden table",
    "curly quotes": "A photo of the dogs\u2019 \u201cred apple\u201d on a wooden table \u2013 nice",
    "Cyrillic": "Красное яблоко на деревянном столе",
}


def microseconds(step: Callable[[str], object], text: str, n: int) -> float:
    times = []
    for _ in range(5):
        start = time.thread_time()
        for _ in range(n):
            step(text)
        times.append((time.thread_time() - start) / n * 1e6)
    return statistics.median(times)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2000, help="captions that are timed at once")
    n = p.parse_args().n
    ways: dict[str, Callable[[str], object]] = {how: lambda text, how=how: clean(text, how) for how in ("web", "canonicalize")}
    ways |= {f"tokenizer.json, {how}": normalizer(how).normalize_str for how in ("web", "canonicalize")}
    try:
        from open_clip.tokenizer import get_clean_fn

        ways |= {f"open_clip, {name}": get_clean_fn(name) for name in ("whitespace", "canonicalize")}
    except (ImportError, OSError, RuntimeError):  # as `export.reference.require_packages`
        pass
    print(f"{'us a caption':30}" + "".join(f"{name:>14}" for name in CAPTIONS))
    for name, step in ways.items():
        print(f"{name:30}" + "".join(f"{microseconds(step, text, n):14.1f}" for text in CAPTIONS.values()))


if __name__ == "__main__":
    main()
