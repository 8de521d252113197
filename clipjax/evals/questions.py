"""Questions about which caption is whose picture's: of Winoground, SugarCrepe, ARO and WinoGAViL, or in a form of our own."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from clipjax.config import ConfigError
from clipjax.evals.aro import LEFT_OUT
from clipjax.evals.named import Picture, entries, picture

FEWEST = 25  # questions that a pair of attributes of ARO must have to count in the mean over kinds, as in ARO's own code
FORMS = (
    'one of ours has {"images": [NAME, ...], "captions": [TEXT, ...]}, one of SugarCrepe filename, caption and negative_caption, '
    "one of ARO image_path, true_caption and false_caption, one of Winoground image_0, image_1, caption_0 and caption_1, and one "
    "of WinoGAViL cue, candidates and associations"
)


@dataclass(frozen=True)
class Question:
    """Pictures and captions, of which each is one picture's or wrong."""

    key: str
    pictures: tuple[Picture, ...]
    captions: tuple[str, ...]
    own: tuple[tuple[int, ...], ...]  # of each caption: the places of its pictures; none: it is wrong
    kind: str | None = None  # what it is about; None: it is in no mean over kinds


def read_questions(file: str) -> list[Question]:
    """The questions of a file, whose form is seen in its first object.

    Winoground's examples.jsonl (2204.03162) has two pictures, each with a caption; SugarCrepe's seven files (2306.14610) and
    ARO's two (2210.01936) have a picture with a right and a wrong caption, ARO's of a part of it. In our own form, `images` has
    names of pictures, or [NAME, [left, top, width, height]], and `captions` texts: `owner` says of which picture each is, or of
    which several, -1 for none; without it, caption i is of picture i, and the others are wrong. `key` and `kind` are optional.
    WinoGAViL (2207.12576) has a cue and candidates, of which some are its associations.

    Raises ConfigError as `entries` does, and for an object of no known form."""
    found = entries(file)
    form = next((read for mark, read in READERS.items() if mark in found[0][1]), None)
    if form is None:
        raise ConfigError(f"questions = {file!r}: {', '.join(found[0][1])} are the fields of no question known: {FORMS}")
    questions = []
    for key, entry in found:
        try:
            questions.append(_checked(form(key, entry)))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"questions = {file!r}: question {key} {what}; {FORMS}") from error
    if "attributes" in found[0][1]:
        few = {kind for kind, n in Counter(q.kind for q in questions).items() if n < FEWEST}
        return [replace(q, kind=None) if q.kind in few else q for q in questions]
    return questions


def _own(key: str, entry: dict[str, Any]) -> Question:
    pictures, captions = tuple(map(picture, entry["images"])), tuple(map(str, entry["captions"]))
    owner = entry.get("owner") or [i if i < len(pictures) else -1 for i in range(len(captions))]
    own = tuple(tuple(places) if isinstance(places, list) else (places,) * (places != -1) for places in owner)
    kind = None if entry.get("kind") is None else str(entry["kind"])
    return Question(str(entry.get("key", key)), pictures, captions, own, kind)


def _winoground(key: str, entry: dict[str, Any]) -> Question:
    pictures, captions = ((entry[f"{what}_0"], entry[f"{what}_1"]) for what in ("image", "caption"))
    return Question(str(entry.get("id", key)), tuple(map(picture, pictures)), captions, ((0,), (1,)), entry.get("collapsed_tag"))


def _sugarcrepe(key: str, entry: dict[str, Any]) -> Question:
    return Question(key, (picture(entry["filename"]),), (entry["caption"], entry["negative_caption"]), RIGHT_WRONG)


def _aro(key: str, entry: dict[str, Any]) -> Question:
    box = tuple(float(entry[f"bbox_{side}"]) for side in "xywh")
    kind = entry["relation_name"] if "relation_name" in entry else " and ".join(entry["attributes"])
    captions = entry["true_caption"], entry["false_caption"]
    return Question(key, (Picture(str(entry["image_path"]), box),), captions, RIGHT_WRONG, None if kind in LEFT_OUT else kind)


def _winogavil(key: str, entry: dict[str, Any]) -> Question:
    """As DataComp's eval_utils/wino_eval.py asks: the caption is `A cue` or `An cue`, and kinds are the numbers of candidates."""
    cue, names = str(entry["cue"]).lower(), [str(name) for name in entry["candidates"]]
    own = tuple(i for i, name in enumerate(names) if name in map(str, entry["associations"]))
    kind = "5-6" if len(names) <= 6 else "10-12" if len(names) >= 10 else None
    return Question(key, tuple(map(Picture, names)), (f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}",), (own,), kind)


RIGHT_WRONG = ((0,), ())  # the first caption is the picture's, the second is wrong
READERS = {  # by a field of each
    "images": _own,
    "image_0": _winoground,
    "negative_caption": _sugarcrepe,
    "false_caption": _aro,
    "associations": _winogavil,
}


def _checked(question: Question) -> Question:
    """The question. Raises ValueError for one that can't be asked."""
    pictures, captions = len(question.pictures), len(question.captions)
    places = [place for own in question.own for place in own]
    if not all(isinstance(text, str) for text in question.captions):
        raise ValueError("has a caption that is no text")
    if len(question.own) != captions or not places or not all(type(place) is int and 0 <= place < pictures for place in places):
        raise ValueError(f"has {captions} captions, whose pictures can't be {list(map(list, question.own))} of {pictures}")
    if all(set(own) == set(range(pictures)) for own in question.own):
        raise ValueError("leaves nothing to choose from")
    return question
