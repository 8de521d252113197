import json

import pytest

from clipjax.config import ConfigError
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("caption", {"caption": 1}),
        ("json.caption", {"json.caption": 1}),
        ("txt=0.7,json.alt=0.3", {"txt": 0.7, "json.alt": 0.3}),
        (" txt = .7 , json.alt = .3 ", {"txt": 0.7, "json.alt": 0.3}),
        ("a,b,c,d", dict.fromkeys("abcd", 0.25)),
        ("a=1", {"a": 1}),
        ("x=y=1", {"x=y": 1}),
        ("a=.333333,b=.333333,c=.333334", {"a": 0.333333, "b": 0.333333, "c": 0.333334}),
    ],
)
def test_parse(text, fields):
    assert dict(columns.parse(text, "data.text_field")) == pytest.approx(fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a field has no name"),
        ("a,,b", "a field has no name"),
        ("=1", "a field has no name"),
        ("a,a", "a comes twice"),
        ("a=0.5,b", "some fields have a probability and some have none"),
        ("a=much,b=0.1", "a probability is no number"),
        ("a=0.5,b=0.6", "must be positive and sum to 1; here to 1.1"),
        ("a=0,b=1", "must be positive"),
        ("a=nan,b=1", "must be positive"),
    ],
)
def test_what_is_no_field_is_refused(text, message):
    with pytest.raises(ConfigError, match=f"^data.text_field = {text!r}: .*{message}"):
        columns.parse(text, "data.text_field")


def test_a_field_is_a_column_and_a_path_in_it():
    known = ["txt", "json", "caption.txt", "json.meta", "odd,name=1"]
    assert columns.locate("json.alt.en", "f", known, "suffixes") == Field("json", ("alt", "en"))
    assert columns.locate("json.meta.alt", "f", known, "suffixes") == Field("json.meta", ("alt",))  # the longest that fits
    assert columns.locate("caption.txt", "f", known, "suffixes") == Field("caption.txt")
    assert columns.locate_texts("odd,name=1", "f", known, "suffixes") == (Field("odd,name=1"),)
    assert columns.locate_texts("txt=.75,json.a=.25", "f", known, "suffixes") == (
        Field("txt", (), 0.75),
        Field("json", ("a",), 0.25),
    )
    message = r"^data.text_field = 'jsn.alt': is not among the columns of a.csv; there are txt, json, .*; the nearest is json"
    with pytest.raises(ConfigError, match=message):
        columns.locate("jsn.alt", "data.text_field", known, "columns of a.csv")
    with pytest.raises(ConfigError, match="there are none"):
        columns.locate("a", "data.text_field", [], "columns of a.csv")


META = {
    "caption": "a fox",
    "alt": {"en": "fox", "de": ["Fuchs", "ein Fuchs"]},
    "a.b": 7,
    "sentences": [{"raw": "x"}, {"raw": "y"}],
}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("caption", "a fox"),
        ("alt.en", "fox"),
        ("alt.de", ["Fuchs", "ein Fuchs"]),
        ("alt.de.1", "ein Fuchs"),
        ("alt.de.2", None),
        ("a.b", 7),
        ("sentences.raw", ["x", "y"]),
        ("sentences.1.raw", "y"),
        ("nothing", None),
        ("caption.deeper", ValueError),  # a text that is no JSON
        ("a.b.c", None),
    ],
)
def test_value_at(path, found):
    parts = path.split(".")
    for value in (META, json.dumps(META), json.dumps(META).encode()):
        if found is ValueError:
            with pytest.raises(ValueError, match="Expecting value"):
                columns.value_at(value, parts)
        else:
            assert columns.value_at(value, parts) == columns.value_at({"x": value}, ["x", *parts]) == found
    assert columns.value_at(None, ["a"]) is None
    assert columns.value_at("", ["a"]) is None


def test_texts():
    assert columns.texts("a") == ("a",)
    assert columns.texts("ä".encode()) == ("ä",)
    assert columns.texts(["a", None, ["b", "c"]]) == ("a", "b", "c")
    assert columns.texts(None) == columns.texts(float("nan")) == columns.texts([]) == ()
    for wrong in (7, 1.5, True, {"a": "b"}, ["a", 7]):
        with pytest.raises(ValueError, match="expected a text or a list of texts, there is"):
            columns.texts(wrong)
    with pytest.raises(UnicodeDecodeError):
        columns.texts(b"caf\xe9")


def test_gather_divides_the_probability_of_a_field_among_its_captions():
    assert columns.gather([(("a", "b"), 1.0)]) == (("a", "b"), None)
    assert columns.gather([(("a",), 0.5), (("b",), 0.5)]) == (("a", "b"), None)
    captions, chances = columns.gather([(("a",), 0.7), (("b", "c"), 0.3)])
    assert (captions, chances) == (("a", "b", "c"), pytest.approx((0.7, 0.15, 0.15)))
    assert columns.gather([((), 0.7), (("b", "c"), 0.3)]) == (("b", "c"), None)
    captions, chances = columns.gather([((), 0.5), (("b",), 0.3), (("c",), 0.2)])
    assert (captions, chances) == (("b", "c"), pytest.approx((0.6, 0.4)))
    assert columns.gather([((), 1.0)]) == ((), None)


def test_number_and_label():
    assert [columns.number(v) for v in (3, "0.25", " 7 ", [2.5], True)] == [3, 0.25, 7, 2.5, 1]
    assert [columns.number(v) for v in (None, "", float("nan"), "nan", [])] == [None] * 5
    for wrong in ("many", {"a": 1}):
        with pytest.raises(ValueError, match="expected a number, there is"):
            columns.number(wrong)
    assert [columns.label(v) for v in (3, "3", b"12", 3.0, None, "", -1, [4])] == [3, 3, 12, 3, -1, -1, -1, 4]
    with pytest.raises(ValueError, match=r"expected the number of a class, there is 1\.5"):
        columns.label(1.5)
    classes = {"cat": 0, "7": 1}
    assert [columns.label(v, classes) for v in ("cat", "7", 1, "", None)] == [0, 1, 1, -1, -1]
    with pytest.raises(ValueError, match="'dog' is not among the 2 classes"):
        columns.label("dog", classes)
    assert columns.class_names(["b", "a", "b", "", None]) == ("a", "b")
    assert columns.class_names(["3", 1, "-1", None]) is None
    assert columns.class_names(["3", "a"]) == ("3", "a")
