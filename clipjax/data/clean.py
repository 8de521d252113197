"""What is done to a caption before it is tokenized: `tokenizer.clean`. The one rule of cleaning, in Python and as normalizers.

`web` is what open_clip does to every string (ftfy's `fix_text`, HTML entities twice, white space), but for mojibake, which takes
guessing. `canonicalize` is open_clip's mode of that name: `web`, then big_vision's `canonicalize_text`
(evaluators/proj/image_text/prompt_engineering.py), which SigLIP's captions went through. `siglip` and `lower` are what
transformers' tokenizers do to a text (tokenization_siglip.py `canonicalize_text`, tokenization_siglip2.py), and no more.
"""

import functools
import html
import itertools
import re
import string
import unicodedata
from collections.abc import Iterator
from html.entities import codepoint2name, html5

from tokenizers import Regex, normalizers

from clipjax.config import Clean
from clipjax.data.captions import whole

PASSES = 8  # at most: an entity may spell another one
PLAIN = re.compile("[ -%'-~]*")  # printable ASCII without &: nothing to clean but spaces
AMPERSANDS = "&(?:(?:amp|AMP);?|#0*38(?![0-9]);?|#[xX]0*26(?![0-9a-fA-F]);?)+"  # also those that are escaped several times
COLOURS = r"\x1b\[[0-9;]*[A-Za-z]"  # a terminal's
CURLY = (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'))
CONTROL = [*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0xA0), *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
WIDE = [0x3000, *range(0xFF01, 0xFFF0)]  # full and half width
LIGATURES = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
REMOVED = str.maketrans("", "", string.punctuation)
SIGMA = (r"(?<=[\p{L}\p{M}])\u03a3(?!\p{M}*\p{L})", "\u03c2")  # at the end of a word: Python's `lower` knows it


def clean(text: str, how: Clean) -> str:
    """The text that is tokenized. `none` replaces half surrogates only (`captions.whole`).

    `web`: HTML entities (also those that are escaped twice) become characters, and C1 controls those of Windows-1252; other
    control characters, byte-order marks and a terminal's colours are removed; curly quotes become straight, full width becomes
    half, ligatures become letters; NFC; white space becomes single spaces, none at the ends.
    `canonicalize`: `web`, without ASCII punctuation (`_` is a space), in lower case.
    `siglip`: lower case, no ASCII punctuation (`_` neither), single spaces, none at the ends.
    `lower`: lower case, character by character."""
    text = whole(text)
    if how == "none":
        return text
    if how == "lower":
        return text.replace("\u03a3", "\u03c3").lower()  # Python alone knows the sigma at the end of a word
    if how == "siglip":
        return " ".join(text.lower().translate(REMOVED).split())
    if not PLAIN.fullmatch(text):
        text = _web(text)
    if how == "canonicalize":
        text = text.translate(PUNCTUATION).lower()
    return " ".join(text.split())


def _web(text: str) -> str:
    for _ in range(PASSES):
        before = text
        if "&" in text:
            text = html.unescape(re.sub(AMPERSANDS, "&", text))
            text = re.sub("&[A-Z0-9]{2,};", lambda found: _capitals().get(found[0], found[0]), text)
        if "\x1b" in text:
            text = re.sub(COLOURS, "", text)
        text = unicodedata.normalize("NFC", text.translate(_characters()))
        if "&" not in text or text == before:
            break
    return text


@functools.cache
def _characters() -> dict[int, str]:
    """What single characters become."""
    c1 = {n: chr(n).encode("latin-1").decode("cp1252", "ignore") for n in range(0x80, 0xA0)}
    table = {n: c1.get(n, "") for n in CONTROL}
    table |= {n: unicodedata.normalize("NFKC", chr(n)) for n in WIDE + LIGATURES}
    table[0xFB05] = "\u017ft"  # as ftfy: a long s remains one
    for curly, straight in CURLY:
        table |= {n: straight for n in range(0x2BC, 0x2020) if re.fullmatch(curly, chr(n))}
        table = {n: re.sub(curly, straight, text) for n, text in table.items()}
    return {n: text for n, text in table.items() if text != chr(n)}


@functools.cache
def _capitals() -> dict[str, str]:
    """Entities whose name was put into capitals with the text around them, as `&EACUTE;`: those that are none by themselves."""
    names = {f"&{name.upper()}": char.upper() for name, char in html5.items() if name[-1] == ";" and name.islower()}
    return {name: char for name, char in names.items() if html.unescape(name) == name}


@functools.cache
def normalizer(how: Clean) -> normalizers.Sequence:
    """`clean` as a part of a tokenizer.json, for libraries that know nothing of it.

    Of HTML's entities it has those of HTML 4 and of ASCII, by name and by number, some 350: each costs a pass over the text, so
    that all of HTML 5 would take 0.4 ms a caption instead of 0.1."""
    if how == "none":
        return normalizers.Sequence([])
    if how == "lower":
        return normalizers.Sequence([normalizers.Lowercase()])
    spaces = [_replace(r"\s+", " "), normalizers.Strip()]
    if how == "siglip":
        removed = _replace("[" + re.escape(string.punctuation) + "]", "")
        spaces[0] = _replace(r"[\s\x1c-\x1f]+", " ")  # what Python takes for white space, which `web` removes
        return normalizers.Sequence([_replace(*SIGMA), normalizers.Lowercase(), removed, *spaces])
    characters = itertools.starmap(_replace, [(AMPERSANDS, "&"), *_entities(), (COLOURS, ""), *_classes()])
    web = [*characters, normalizers.NFC(), *spaces]
    if how == "web":
        return normalizers.Sequence(web)
    removed = "[" + re.escape(string.punctuation.replace("_", "")) + "]"
    lower = [_replace(*SIGMA), normalizers.Lowercase()]
    return normalizers.Sequence([*web, _replace("_", " "), _replace(removed, ""), *lower, *spaces])


def _replace(pattern: str, text: str) -> normalizers.Replace:
    return normalizers.Replace(Regex(pattern), text)


def _classes() -> Iterator[tuple[str, str]]:
    """A pattern for all characters that become the same text, and that text."""
    table = sorted(_characters().items(), key=lambda item: (item[1], item[0]))
    for text, items in itertools.groupby(table, key=lambda item: item[1]):
        yield "|".join(re.escape(chr(n)) for n, _ in items), text  # a class of one character takes four times as long


def _entities() -> Iterator[tuple[str, str]]:
    """A pattern for all spellings of a character's entity, and the character."""
    characters = sorted({chr(n) for n in codepoint2name} | {chr(n) for n in range(0x20, 0x7F)} | set("\t\n\r\u200b\ufeff"))
    names: dict[str, list[str]] = {c: [] for c in characters if c != "&"}
    for name, text in itertools.chain(html5.items(), ((entity[1:], c) for entity, c in _capitals().items())):
        if text in names:
            names[text].append(name)
    legacy = {n: html.unescape(f"&#{n};") for n in range(0x80, 0xA0)}  # numbers of Windows-1252's, which HTML allows
    for c, spelled in names.items():
        numbers = [ord(c), *(n for n, text in legacy.items() if text == c)]
        by_number = [f"#0*{n}(?![0-9]);?|#[xX]0*(?i:{n:x})(?![0-9a-fA-F]);?" for n in numbers]
        yield "&(?:" + "|".join([*map(_spelling, sorted(spelled, reverse=True)), *by_number]) + ")", c


def _spelling(name: str) -> str:
    """A pattern for the name of an entity. One without a semicolon must not be the beginning of a longer one."""
    longer = "|".join(
        sorted(other[len(name) :] for other in html5 if other.startswith(name) and other != name and other[-1] == ";")
    )
    return name if name[-1] == ";" else f"{name}(?!{longer})"
