import subprocess
import sys
import unicodedata

import emoji as package
import numpy as np
import pytest

from clipjax.data.captions import caption_id, choose, kept, normalise, visible

SAME = [
    ("A dog, running.", "a  dog running"),
    ("A DOG -- running !", "a dog running"),
    ("It’s a “dog”", "it's a 'dog'"),
    ("T-shirt", "t shirt"),
    ("snake_case", "snake case"),
    ("\tone\u00a0two\u3000three\n", "one two three"),
    ("cafe\u0301", "café"),  # composed or not
    ("Straße", "STRASSE"),
    ("ΟΔΟΣ", "οδος"),  # both small sigmas
    ("ｆｕｌｌ　ｗｉｄｔｈ！", "full width"),
    ("ﾈｺ。", "ネコ"),  # half-width, ideographic full stop
    ("犬、走る。", "犬 走る"),
    ("कुत्ता, दौड़ता है।", "कुत्ता दौड़ता है"),
    ("كلب، يجري؟", "كلب يجري"),
    ("می\u200cروم", "میروم"),  # joiners can't be seen
    ("\u202bשלום\u202c", "שלום"),
    ("soft\u00adhyphen", "softhyphen"),
    ("❤\ufe0f", "❤"),
]
DIFFERENT = [
    ("a dog", "a cat"),
    ("adog", "a dog"),
    ("cafe", "café"),
    ("C", "C++"),
    ("C", "C#"),
    ("keycap #", "keycap *"),
    ("5 %", "5"),
    ("5 °C", "5 C"),
    ("👍", "👍🏽"),
    ("🏴\U000e0065\U000e006e\U000e0067\U000e007f", "🏴\U000e0073\U000e0063\U000e0074\U000e007f"),  # flags, by tags
    ("कि", "की"),  # vowel signs are no punctuation
    ("か", "が"),
]
EMPTY = ["", " ", "  ", "?", "!", "?!", "...", "。", "-", "--", "_", "\u200b", "\u200d", "\ufe0f", "\n", "\x00"]

INVISIBLE = [
    *["", " ", "\t\r\n", "\u00a0\u2003\u3000", "\u2028\u2029", "\x00\x1b\x7f\x85"],
    *[
        "\ufeff",
        "\u200b\u200c\u200d\u2060",
        "\u200e\u202a\u202c\u2066",
        "\u00ad",
        "\u180e\ufe0f\U000e0100",
        "\U000e0067\U000e007f",
    ],
    *["\u0301", "\u034f", "\u20e3", " \u0308 ", "\u093e", "\ud83d", "\udc00\ud800"],  # marks alone, half surrogates
    *["\u2800\u2800", "\u3164", "\u115f\u1160", "\uffa0", "\ufffc", "\uffff", "\ufdd0", "\U0010ffff"],
    *["&nbsp;", "&#8203; &#xFEFF;", "&amp;nbsp;", "&zwnj;&NewLine;"],
]
VISIBLE = [
    *[
        "a",
        "0",
        ".",
        "?",
        "&",
        "&amp;",
        "$",
        "\u00b0",
        "\u00b4",
        "e\u0301",
        "\u0915\u093e",
        "\u06d4",
        "\u4eba",
        "\u1112",
        "\u11a8",
    ],
    *[
        "\U0001f600",
        "\u2764\ufe0f",
        "\U0001f1e9\U0001f1ea",
        "\U0001f468\u200d\U0001f469",
        "#\ufe0f\u20e3",
        "\u2801",
        "\ufffd",
        "\ue000",
    ],
    *["\U0001fae8", "\U0001f6d8", "\U0001faea"],  # emoji of Unicode 15, 17 and 16, whichever of them this Python knows
    *["\ufeff\u200bx", "\ud83dx"],
]


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_caption_without_a_visible_character_is_none(text):
    assert not visible(text)


@pytest.mark.parametrize("text", VISIBLE)
def test_visible(text):
    assert visible(text)


def test_half_surrogates_are_replaced():
    assert kept(["a \ud83d", "\ud83d\ude00", "\ude00\ud83d", "b"]) == ("a \ufffd", "\U0001f600", "b")
    "".join(kept(VISIBLE)).encode()


def test_kept_captions_are_unchanged_and_in_order():
    assert kept([" b ", "\ufeff", "a", "", "a"]) == (" b ", "a", "a")
    assert kept(INVISIBLE) == ()


@pytest.mark.parametrize(("one", "other"), SAME)
def test_near_duplicates_share_an_id(one, other):
    assert normalise(one) == normalise(other)
    assert caption_id(one) == caption_id(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_captions_do_not_share_an_id(one, other):
    assert normalise(one) != normalise(other)
    assert caption_id(one) != caption_id(other)


def test_captions_without_a_word_stay_different():
    assert len({caption_id(text) for text in EMPTY}) == len(EMPTY)
    assert caption_id(" ... ") == caption_id("…")  # alike but for white space and width
    assert all(normalise(text) for text in EMPTY if text)


def test_normal_form_is_stable():
    """Over all of Unicode, alone and within a word."""
    points = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) not in ("Cn", "Co", "Cs")]
    for text in [*points[::3], *(f"a{c}b" for c in points[1::3])]:
        once = normalise(text)
        assert normalise(once) == once, hex(ord(text[len(text) // 2]))


def test_names_of_emoji_have_different_ids():
    """In every language, and the emoji themselves as captions."""
    package.config.load_language()
    known = {s: names for s, names in package.EMOJI_DATA.items() if names["status"] == package.STATUS["fully_qualified"]}
    assert len(known) > 3700
    for language in package.LANGUAGES:
        names = {names[language] for names in known.values() if language in names}
        assert len({caption_id(name) for name in names}) == len(names), language
    assert len({caption_id(s) for s in known}) == len(known)


def test_id_is_an_int32_and_the_same_in_every_process():
    """Pinned: a run that is resumed, on any machine, must compute the same ids."""
    ids = [caption_id(text) for text in ("a dog", "नमस्ते", "", "\ud800")]
    assert ids == [211330204, 543612987, 154724242, 476916723]
    code = "from clipjax.data.captions import caption_id as c; print(c('a dog'), c('नमस्ते'), c(''), c('\\ud800'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == ids
    many = np.array([caption_id(f"number {i}") for i in range(20_000)])
    assert many.min() >= 0
    assert many.max() < 2**31
    assert len(set(many.tolist())) == len(many)  # 0.09 false merges are to be expected
    assert abs(many.mean() / 2**30 - 1) < 0.02  # uniform: standard error 0.004


def test_draws():
    rng = np.random.default_rng(0)
    assert {choose(3, 1, rng)[0] for _ in range(50)} == {0, 1, 2}
    assert choose(4, 4, rng) == [0, 1, 2, 3]
    assert choose(2, 5, rng) == [0, 1, 0, 1, 0]
    assert choose(1, 2, rng) == [0, 0]
    seen = [choose(14, 3, rng) for _ in range(2600)]
    assert all(d[0] == 0 < d[1] < d[2] < 14 for d in seen)
    counts = np.bincount([i for d in seen for i in d[1:]], minlength=14)[1:]
    assert (np.abs(counts - 400) < 5 * np.sqrt(400 * 11 / 13)).all()  # each of the 13 others in 2 of 13 draws


def test_one_of_several_is_chosen_as_in_earlier_versions():
    """The same stream as in runs from before data.captions_per_image existed."""
    ours, plain = np.random.default_rng(7), np.random.default_rng(7)
    assert [choose(5, 1, ours)[0] for _ in range(20)] == [int(plain.integers(5)) for _ in range(20)]
