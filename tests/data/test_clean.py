"""What is done to captions before they are tokenized, in Python and as the normalizers of a tokenizer.json."""

import string
import sys
import unicodedata
from html.entities import codepoint2name, html5

import pytest

from clipjax.data.clean import clean, normalizer
from tests.web import RARE, WEB

CLEANED = {
    "AT&amp;amp;T &lt;3": "AT&T <3",
    "P&EACUTE;REZ &amp;#39;x&#x27;": "PÉREZ 'x'",
    "&Jscr;ohn, Tom &amp Jerry": "𝒥ohn, Tom & Jerry",
    "salt &pepper; &notit;": "salt &pepper; ¬it;",
    "it\u2019s \u201cso\u201d it&rsquo;s it\x92s": "it's \"so\" it's it's",
    "\ufeffa\x00b\x1b[31mc\x1b[0m\x7f\u206a": "abc",
    "\uff26\uff55\uff4c\uff4c \ufb01ne \uff76\uff9e": "Full fine ガ",
    "cafe\u0301": "café",
    "  a\u00a0\tb\r\nc\u3000&nbsp;d ": "a b c d",
    "x² ½ ™ … — Ω": "x² ½ ™ … — Ω",  # only what looks alike is replaced
    "\U0001f468\u200d\U0001f469 \u2764\ufe0f": "\U0001f468\u200d\U0001f469 \u2764\ufe0f",  # joiners and selectors make emoji
    "می\u200cروم": "می\u200cروم",  # and words
    "\ud83d\ude00 \ud83d": "\U0001f600 \ufffd",
    "<|endoftext|>": "<|endoftext|>",
}
CANONICAL = {
    "A photo of a Cat.": "a photo of a cat",
    "snake_case_name": "snake case name",
    "AT&amp;T: R&D -- 50%": "att rd 50",
    "\u201cIt\u2019s\u201d": "its",
    "ΟΔΟΣ ΣΑΣ Σ": "οδος σας σ",
    "日本語、写真！": "日本語、写真",  # the full-width mark is ASCII's; the ideographic comma is not
    "...": "",
}
SIGLIP = {  # as transformers' SiglipTokenizer
    "A photo of a Cat.": "a photo of a cat",
    "snake_case  name ": "snakecase name",
    "AT&amp;T \u201cIt\u2019s\u201d": "atampt \u201cit\u2019s\u201d",
    "ΟΔΟΣ": "οδος",
}
LOWER = {" A  photo, of a CAT.\n": " a  photo, of a cat.\n", "ΟΔΟΣ &AMP; Ä": "οδοσ &amp; ä"}  # as its Siglip2Tokenizer


@pytest.mark.parametrize(("text", "expected"), CLEANED.items())
def test_web(text, expected):
    assert clean(text, "web") == expected


@pytest.mark.parametrize(("text", "expected"), CANONICAL.items())
def test_canonicalize(text, expected):
    assert clean(text, "canonicalize") == expected


@pytest.mark.parametrize(("how", "expected"), [("siglip", SIGLIP), ("lower", LOWER)])
def test_as_the_tokenizers_of_transformers(how, expected):
    assert {text: clean(text, how) for text in expected} == expected


def test_none_leaves_everything_but_half_surrogates():
    for text in WEB:
        whole = not any("\ud800" <= c <= "\udfff" for c in text)
        assert (clean(text, "none") == text) == whole
        clean(text, "none").encode()


@pytest.mark.parametrize("how", ["web", "canonicalize", "siglip", "lower"])
def test_cleaning_twice_changes_nothing_more(how):
    for text in [*WEB, *RARE]:
        once = clean(text, how)
        assert clean(once, how) == once, ascii(text)


@pytest.mark.parametrize("how", ["web", "canonicalize", "siglip", "lower"])
def test_normalizers_do_the_same(how):
    chain = normalizer(how)
    wrong = [ascii(text) for text in WEB if chain.normalize_str(clean(text, "none")) != clean(text, how)]
    assert not wrong
    rare = [chain.normalize_str(text) == clean(text, how) for text in RARE]
    assert set(rare) == {how in ("siglip", "lower")}  # documented; `export --verify` counts them


def test_normalizers_do_the_same_to_every_character():
    """Of the planes in use; one in seven of the ideographs and syllables, which are thousands. Ten at a time: it is faster."""
    known = [chr(n) for n in range(0x20000) if unicodedata.category(chr(n)) not in ("Cn", "Co", "Cs")]
    chosen = [c for c in known if not "\u3400" <= c <= "\ud7ff" or ord(c) % 7 == 0]
    chain = normalizer("web")
    for start in range(0, len(chosen), 64):
        text = "".join(f"a{c}b " for c in chosen[start : start + 64] if c != "&")
        assert chain.normalize_str(text) == clean(text, "web")
    assert len(chosen) > 40_000
    assert sys.maxunicode > 0x20000


def test_normalizers_know_every_spelling_of_html_4():
    chain = normalizer("web")
    characters = [chr(n) for n in codepoint2name] + [c for c in string.printable if c not in "\x0b\x0c"]
    named = [f"&{name}" for name, c in html5.items() if c in characters and c != "&"]
    numbered = [f"&#{form};" for c in characters for n in [ord(c)] for form in (f"{n}", f"0{n}", f"x{n:x}", f"X00{n:X}")]
    joined = " ".join(f"x{entity}{after}y" for entity in [*named, *numbered] for after in ("", " "))
    assert len(named + numbered) > 1500
    assert chain.normalize_str(joined) == clean(joined, "web")
