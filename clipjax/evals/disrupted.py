"""Disrupted copies of captions: other words, or the same words in another order. A model that reads them tells them apart."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from clipjax.evals.named import Picture
from clipjax.evals.questions import RIGHT_WRONG, Question

TRIES = 10  # random copies that may be the caption itself
Words = list[str]


def disrupted(captions: Sequence[tuple[str, str]]) -> list[tuple[int, Question]]:
    """For each (key of a picture, its caption) and each way to disrupt: the caption against one copy, with the caption's place.

    The copies are the same on every call and machine. A caption whose words give no other copy has none of that kind."""
    vocabulary = sorted({word for _, caption in captions for word in caption.split()})
    questions = []
    for place, (key, caption) in enumerate(captions):
        for kind, change in KINDS.items():
            copy = _copy(caption, kind, change, vocabulary)
            if copy is not None:
                question = Question(f"{key} {kind}", (Picture(key),), (caption, copy), RIGHT_WRONG, kind)
                questions.append((place, question))
    return questions


Change = Callable[[Words, np.random.Generator, Sequence[str]], Words]


def _copy(caption: str, kind: str, change: Change, vocabulary: Sequence[str]) -> str | None:
    words = caption.split()
    rng = np.random.default_rng(zlib.crc32(f"{kind} {caption}".encode("utf-8", "surrogatepass")))
    copies = (change(words, rng, vocabulary) for _ in range(TRIES))
    return next((" ".join(copy) for copy in copies if copy != words), None)


def _shuffled(words: Words, rng: np.random.Generator, vocabulary: Sequence[str]) -> Words:
    return [words[i] for i in rng.permutation(len(words))]


def _trigrams(words: Words) -> list[Words]:
    return [words[i : i + 3] for i in range(0, len(words), 3)]


def _of_trigrams(words: Words, rng: np.random.Generator, vocabulary: Sequence[str]) -> Words:
    threes = _trigrams(words)
    return [word for i in rng.permutation(len(threes)) for word in threes[i]]


def _replaced(words: Words, rng: np.random.Generator, vocabulary: Sequence[str]) -> Words:
    place = int(rng.integers(max(len(words), 1)))
    return [*words[:place], vocabulary[int(rng.integers(len(vocabulary)))], *words[place + 1 :]]


KINDS: dict[str, Change] = {
    "shuffle_all_words": _shuffled,  # this and the next two as in ARO, whose words are nltk's and not those between spaces
    "shuffle_within_trigrams": lambda words, *how: [word for three in _trigrams(words) for word in _shuffled(three, *how)],
    "shuffle_trigrams": _of_trigrams,
    "replace_word": _replaced,  # by one of another caption, each as likely
}
