"""Which captions are used, of a source and at one visit, and when two captions count as equal."""

import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from clipjax.config import TextAugment

KEPT_PUNCTUATION = "#%&*@"  # by which names differ: `keycap #` and `keycap *`, `C#`, `R&B`, `50 %`
BLANK = {  # neither space, control nor format character by its category, and yet nothing is drawn
    *"\u115f\u1160\u3164\uffa0",  # Hangul fillers
    *"\u2800\ufffc",  # Braille without a dot; the place of an object that the text lacks
    *"\U0001d159\U00013441\U00013442",  # null note head; hieroglyphic blanks
}
_ASCII = re.compile("[!-~]")
_HALVES = re.compile("[\ud800-\udfff]")
_NEVER_DRAWN = re.compile("[\u2065\ufdd0-\ufdef\ufff0-\ufff8\U000e0000-\U000e0fff]")  # of the characters that are not assigned


def visible(text: str) -> bool:
    """Whether a text has a character that can be seen. One rule for all sources: a caption without is none.

    White space, control and format characters (zero-width ones, byte-order marks, direction marks), half surrogates, fillers
    and blanks can't be seen, nor marks without a letter to stand on (accents, variation selectors). Of HTML entities the
    character counts: `&nbsp;` is a space. Private-use characters and those of a later Unicode count as visible."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return _ASCII.search(text) is not None or any(map(_visible, _joined(text, "ignore")))


def kept(texts: Iterable[str]) -> tuple[str, ...]:
    """The captions that have a visible character, in order, and unchanged but for `whole`."""
    return tuple(whole(text) for text in texts if visible(text))


def whole(text: str) -> str:
    """The text without half surrogates, which JSON may hold, and which can be neither printed nor tokenized: two that belong
    together become their character, others U+FFFD."""
    return _joined(text, "replace")


def choose(n: int, k: int, rng: np.random.Generator, chances: Sequence[float] | None = None) -> list[int]:
    """The numbers of the k captions, of n, that are used at one visit.

    k = 1: any one, each with its share of `chances`, or all alike. Otherwise the main one, number 0, and k - 1 of the others
    without replacement. With fewer than k captions, all of them, repeated in turn: a caption that comes twice is one more
    positive of the same image."""
    if k == 1 and chances is not None:
        return [int(rng.choice(n, p=np.divide(chances, sum(chances))))]
    if k == 1:
        return [int(rng.integers(n))]
    if n <= k:
        return [i % n for i in range(k)]
    return [0, *(1 + np.sort(rng.choice(n - 1, k - 1, replace=False))).tolist()]


def changed(caption: str, how: TextAugment, rng: np.random.Generator) -> str:
    """A copy of a caption with words left out, and others in each other's places. What stands between two white spaces is a word:
    text without spaces, as Japanese, is one word, and stays as it is."""
    words = caption.split()
    kept = [word for word in words if rng.random() >= how.delete] or [words[rng.integers(len(words))]]
    for i in range(len(kept)):
        if rng.random() < how.swap and len(kept) > 1:
            j = (i + rng.integers(1, len(kept))) % len(kept)
            kept[i], kept[j] = kept[j], kept[i]
    return " ".join(kept)


def normalise(caption: str) -> str:
    """The form that is equal for near-duplicates. Captions are near-duplicates if they differ only in case, in the width and
    composition of letters (Unicode's NFKC and full case folding), in punctuation other than #%&*@, in white space, and in
    invisible characters (joiners, direction marks, variation selectors).

    Punctuation separates words as a space does. Symbols (+, $, °, emoji) and accents stay. A caption that consists of
    punctuation keeps it, so that `?` and `!` differ. One that consists of invisible characters is returned as it is."""
    text = "".join(c for c in caption if not _invisible(c))
    for form in ("NFD", "NFKC"):  # twice, as Unicode defines caseless matching (D146): folding undoes parts of normalising
        text = unicodedata.normalize(form, text).casefold()
    text = unicodedata.normalize("NFKC", text)
    words = "".join(" " if _separates_words(c) else c for c in text).split()
    return " ".join(words or text.split()) or caption


def caption_id(caption: str) -> int:
    """An id in [0, 2^31) of the normalised caption, the same on every machine: 31 bits of BLAKE2b.

    Two different captions get the same id with probability 2^-31. In batches of 32,768 this is expected once in four batches
    (0.25 of 537 million pairs), and a given image loses one of its negatives once in 65,500 visits."""
    return int.from_bytes(blake2b(normalise(caption).encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1


def _joined(text: str, errors: str) -> str:
    """`errors`: what Python's decoder does to half surrogates that stand alone."""
    if text.isascii() or not _HALVES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", errors)


@functools.cache
def _invisible(c: str) -> bool:
    """Format characters (joiners, direction marks, soft hyphens) and variation selectors; not tags, by which flags differ."""
    return (unicodedata.category(c) == "Cf" and c < "\U000e0000") or "VARIATION SELECTOR" in unicodedata.name(c, "")


@functools.cache
def _visible(c: str) -> bool:
    if (category := unicodedata.category(c)) == "Cn":  # not assigned, perhaps in this Python's Unicode only: emoji are added
        return not _NEVER_DRAWN.match(c) and ord(c) & 0xFFFE != 0xFFFE
    return category == "Co" or (category[0] in "LNPS" and c not in BLANK)


@functools.cache
def _separates_words(c: str) -> bool:
    category = unicodedata.category(c)
    return category == "Cc" or (category[0] in "ZP" and c not in KEPT_PUNCTUATION)
