"""Which of a picture's captions an example carries, and when two captions count as one."""

import functools
import unicodedata
from hashlib import blake2b

import numpy as np

MEANT = "#%&*@"  # punctuation to Unicode that tells names apart: `keycap #` and `keycap *`, `C#`, `R&B`, `50 %`


def drawn(n: int, k: int, rng: np.random.Generator) -> list[int]:
    """Which of n captions an example shows at one visit, k of them, in their own order.

    k = 1: any. Else the main one, number 0, and k - 1 of the others without replacement. Where there are fewer than k, all of
    them, and then in turn again: a caption that comes twice is one more positive of the same picture."""
    if k == 1:
        return [int(rng.integers(n))]
    if n <= k:
        return [i % n for i in range(k)]
    return [0, *(1 + np.sort(rng.choice(n - 1, k - 1, replace=False))).tolist()]


def normalised(caption: str) -> str:
    """What near-duplicates have in common: they differ in case, width and composition of letters (Unicode's NFKC and full case
    folding), in punctuation other than #%&*@, in white space, and in what is invisible (joiners, direction marks, variation
    selectors).

    Punctuation parts words as a space does; symbols (+, $, °, pictures) and accents stay. A caption that is nothing but
    punctuation keeps it, so that `?` and `!` differ; one that has nothing to see at all is itself."""
    text = "".join(c for c in caption if not _invisible(c))
    for form in ("NFD", "NFKC"):  # twice, as Unicode defines caseless matching (D146): the one undoes parts of the other
        text = unicodedata.normalize(form, text).casefold()
    text = unicodedata.normalize("NFKC", text)
    words = "".join(" " if _parts_words(c) else c for c in text).split()
    return " ".join(words or text.split()) or caption


def caption_id(caption: str) -> int:
    """In [0, 2^31), of the normalised caption alone, the same on every machine: 31 bits of BLAKE2b.

    Two captions that differ get one id with a chance of 2^-31: in a batch of 32,768 a false merge is to be expected once in
    four batches (0.25 of 537 million pairs), and a given picture loses one of its negatives once in 65,500 visits."""
    return int.from_bytes(blake2b(normalised(caption).encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1


@functools.cache
def _invisible(c: str) -> bool:
    """Format characters (joiners, direction marks, soft hyphens) and variation selectors; not tags, which tell flags apart."""
    return (unicodedata.category(c) == "Cf" and c < "\U000e0000") or "VARIATION SELECTOR" in unicodedata.name(c, "")


@functools.cache
def _parts_words(c: str) -> bool:
    category = unicodedata.category(c)
    return category == "Cc" or (category[0] in "ZP" and c not in MEANT)
