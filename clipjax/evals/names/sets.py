"""Class names and prompt templates of the field's common test sets, by the names that CLIP_benchmark has for the sets.

classes.json and templates.json are those of CLIP_benchmark 1.6.2 (datasets/en_classnames.json, its templates, the 200 classes of
ImageNet-A, -O and -R in datasets/builder.py). CLIP_benchmark takes the names of cars, cifar10, cifar100, dtd, fgvc_aircraft,
food101, renderedsst2, resisc45, stl10 and sun397 from the data; here they are those of openai/CLIP, data/prompts.md. `ids` are
what datasets call these classes instead: wnids, SUN397's paths and EuroSAT's folders, as TFDS stores them.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
NO_WORD = (  # what a name is that tells a text tower nothing, and how that looks
    ("a number", r"[-+]?\d+([.,]\d+)?"),
    ("a path", r"\.{0,2}/.*|[^ ]*/[^ ]*/.*|.*\.(jpe?g|png|webp)"),
    ("an id", r"n\d{8}|(class|label|cls|id|category)?[ _-]*\d+|[a-z]{0,3}\d{4,}|(?=.*\d)[0-9a-f]{8}[0-9a-f-]*"),
)


@dataclass(frozen=True)
class ClassSet:
    """The classes of a test set, by label."""

    name: str
    names: tuple[str, ...]
    ids: tuple[str, ...] = ()  # what datasets call the classes instead; (): nothing else


@functools.cache
def class_sets() -> dict[str, ClassSet]:
    """All sets that have names here."""
    stored = json.loads((FOLDER / "classes.json").read_text(encoding="utf-8"))
    whole = {name: ClassSet(name, tuple(s["names"]), tuple(s.get("ids", ()))) for name, s in stored.items() if "names" in s}
    parts = {name: _part(name, whole[s["of"]], s["labels"]) for name, s in stored.items() if "of" in s}
    return whole | parts


@functools.cache
def template_sets() -> dict[str, tuple[str, ...]]:
    """The templates of each set, with `{c}` where the name goes."""
    return {name: tuple(s) for name, s in json.loads((FOLDER / "templates.json").read_text(encoding="utf-8")).items()}


def identified(names: tuple[str, ...]) -> ClassSet | None:
    """The set whose ids these names are, all of them or, of ids that are no words, some; None: they are no ids."""
    for found in class_sets().values():
        if set(names) <= set(found.ids) and (len(names) == len(found.ids) or no_word(names)):
            return found
    return None


def no_word(names: tuple[str, ...]) -> str | None:
    """What most of the names are, if it tells a text tower nothing: `a number`, `a path`, `an id`."""
    for what, pattern in NO_WORD:
        if 2 * sum(re.fullmatch(pattern, name, re.IGNORECASE) is not None for name in names) > len(names):
            return what
    return None


def suggestion(count: int) -> str:
    """Which set of names may fit a dataset of so many classes, for a message; empty: none."""
    fitting = sorted(found.name for found in class_sets().values() if len(found.names) == count)
    return f"; of {count} classes there are names for {', '.join(fitting)}" if fitting else ""


def _part(name: str, whole: ClassSet, labels: list[int]) -> ClassSet:
    return ClassSet(name, tuple(whole.names[i] for i in labels), tuple(whole.ids[i] for i in labels))
