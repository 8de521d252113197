"""Whether another library's tokenizer gives the ids that ours gives, for captions as they are."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.captions import whole
from clipjax.data.clean import clean, normalizer
from clipjax.data.tokenizer import Tokenizer

MOST, ROWS = 5000, 1000  # captions that are compared, in all and at once


@dataclass(frozen=True)
class Agreement:
    """How many captions were compared, and how many get equal ids; the same of those that name a special token."""

    captions: int
    same: int
    special: int
    special_same: int
    other: str | None  # the first caption with other ids

    @property
    def figure(self) -> str:
        share = f"captions with equal ids: {self.same:,} of {self.captions:,} ({self.same / self.captions:.2%})"
        return share if self.other is None else f"{share}; not {self.other[:100]!r}"

    @property
    def notes(self) -> list[str]:
        which = f"captions with the string of a special token: {self.special:,}, of which {self.special_same:,} get equal ids"
        return [f"{which}: to clipjax it is text, other loaders may end a caption there"] * bool(self.special)


def agreement(ids: Callable[[Sequence[str]], Any], words: Tokenizer, captions: Iterable[str]) -> Agreement | None:
    """Compares `ids`, another library's tokenizer, strings to integers [n, t], with ours, on the first
    captions, 5,000 at most. None: there are none."""
    same: list[bool] = []
    captions = [whole(text) for text in itertools.islice(captions, MOST)]  # other tokenizers fail at half surrogates
    for start in range(0, len(captions), ROWS):
        texts = captions[start : start + ROWS]
        same += (np.asarray(ids(texts)) == words.encode(texts)[0]).all(axis=1).tolist()
    special = [equal for equal, text in zip(same, captions, strict=True) if words.names_special(text)]
    other = next((text for equal, text in zip(same, captions, strict=True) if not equal), None)
    return Agreement(len(same), sum(same), len(special), sum(special), other) if captions else None


def may_differ(words: Tokenizer, text: str) -> bool:
    """Whether another library may give other ids, as documented: `text` names a special token, or has an entity that our
    tokenizer.json can't resolve."""
    incomplete = normalizer(words.clean).normalize_str(whole(text)) != clean(text, words.clean)
    return words.names_special(text) or (words.clean != "none" and incomplete)
