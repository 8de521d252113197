"""Which caption is whose picture's: text, image and group score (Winoground, 2204.03162), expected where scores tie."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipjax import config
from clipjax.config.tasks import with_questions
from clipjax.data import reading
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.disrupted import disrupted
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Metrics, Results
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.evals.named import located
from clipjax.evals.questions import Question, read_questions
from clipjax.evals.ties import expected_hits, nearer
from clipjax.models.clip import Params
from clipjax.train.report import say

SCORES = ("text_score", "image_score", "group_score")
ORDERS = 1000  # random orders of tied scores, for a question of more than MOST scores
MOST = 6  # scores of which all orders are tried
LISTED = 16  # kinds of questions of which each has a metric of its own

Embed = Callable[[Params], tuple[Vectors, Bool[np.ndarray, " n"]]]  # unit vectors by number, and which there are

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Questions with equally many pictures and captions."""

    places: Int[np.ndarray, " q"]  # of the questions among all
    pictures: Int[np.ndarray, "q i"]  # numbers of images
    captions: Int[np.ndarray, "q c"]  # numbers of texts
    owner: Int[np.ndarray, "q c"]  # the place of each caption's picture; -1: it is wrong


class ChoiceEvaluation(Evaluation):
    """Questions of a few pictures and captions each."""

    def __init__(self, images: Embed, texts: Embed, questions: Sequence[Question], blocks: Sequence[Block], dataset: str) -> None:
        self._images, self._texts = images, texts
        self.questions, self.blocks, self.dataset = questions, blocks, dataset

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Choice) -> Self:
        source = open_source(data)
        keys, questions = questions_on(source, cfg.questions)
        shown, numbers = located(source, keys, [picture for question in questions for picture in question.pictures])
        texts = {text: i for i, text in enumerate(dict.fromkeys(text for q in questions for text in q.captions))}
        name = with_questions(source.name, cfg.questions)
        captions = caption_batches(encoder, tokenizer, list(texts), range(len(texts)), name)
        images = image_batches(encoder, shown, data, captioned=False)
        embed_images = partial(by_index, encoder, batches=images, n=len(shown))
        embed_texts = partial(by_index, encoder, batches=captions, n=len(texts))
        blocks = blocks_of(questions, numbers, texts)
        _tell(name, questions, blocks, tokenizer.encode(list(texts))[0])
        return cls(embed_images, embed_texts, questions, blocks, name)

    def run(self, params: Params) -> Results:
        """`text_score`: the share of questions in which each picture is nearest to a caption of its own; `image_score`: each
        caption to its picture; `group_score`: both. A score that no question has is None.

        `mean_per_kind_text_score` is the mean over the kinds of questions, and `text_score_KIND` that of each of a few kinds. A
        question of which a picture can't be read does not count."""
        z, found = self._images(params)
        t, _ = self._texts(params)
        values = np.full((len(SCORES), len(self.questions)), np.nan)
        for block in self.blocks:
            readable = found[block.pictures].all(1)
            cosines = np.einsum("qie,qce->qic", z[block.pictures], t[block.captions])
            values[:, block.places] = np.where(readable, scores(cosines, block.owner), np.nan)
        by_score = dict(zip(SCORES, values, strict=True))
        metrics: Metrics = {name: _mean(row) for name, row in by_score.items()}
        given = {name: row for name, row in by_score.items() if metrics[name] is not None}
        groups = [question.pictures[0].name for question in self.questions]
        examples = Examples([question.key for question in self.questions], given, groups)
        return Results(metrics | self._by_kind(by_score["text_score"]), examples=[examples])

    def _by_kind(self, text: Float[np.ndarray, " n"]) -> Metrics:
        kinds = np.array([question.kind or "" for question in self.questions])
        means = {kind: _mean(text[kinds == kind]) for kind in sorted({*kinds.tolist()} - {""})}
        known = [mean for mean in means.values() if mean is not None]
        if not known:
            return {}
        each = {f"text_score_{kind}": mean for kind, mean in means.items()} if len(means) <= LISTED else {}
        return {"mean_per_kind_text_score": float(np.mean(known)), **each}


def questions_on(source: Source, file: str | None) -> tuple[list[str], list[Question]]:
    """The keys of a source's examples, and the questions of a file; without one, main captions against disrupted copies."""
    records = [(record.key, record.captions[:1]) for record in reading.texts(source, quiet=jax.process_index() > 0)]
    keys = [key for key, _ in records]
    if file is not None:
        return keys, read_questions(file)
    require_captions(source, "this evaluation", any(main for _, main in records))
    questions = disrupted((key, main[0]) for key, main in records if main)
    remedy = f"no caption of {source.name} has words that can be put in another order: name a file of questions"
    config.require(bool(questions), "questions", None, remedy)
    return keys, questions


def blocks_of(questions: Sequence[Question], numbers: Sequence[int], texts: dict[str, int]) -> list[Block]:
    """The questions by their shapes. `numbers`: of the images of all questions' pictures, one after another."""
    starts = np.cumsum([0, *(len(question.pictures) for question in questions)])
    shapes: dict[tuple[int, int], list[int]] = {}
    for place, question in enumerate(questions):
        shapes.setdefault((len(question.pictures), len(question.captions)), []).append(place)
    return [
        Block(
            np.array(places),
            np.array([numbers[starts[place] : starts[place + 1]] for place in places]),
            np.array([[texts[text] for text in questions[place].captions] for place in places]),
            np.array([questions[place].owner for place in places]),
        )
        for places in shapes.values()
    ]


def scores(cosines: Float[np.ndarray, "q i c"], owner: Int[np.ndarray, "q c"]) -> Float[np.ndarray, "3 q"]:
    """The text, image and group score of each question: 0 or 1, or the chance of it where scores tie and their order is random.
    NaN: a question does not have the score, because it leaves nothing to choose.

    Of two pictures and two captions a collapsed model scores 1/4, 1/4 and 1/6, which are the chances of guessing."""
    own = owner[:, None, :] == np.arange(cosines.shape[1])[:, None]
    chooses_text = own.any(2).all(1) & (~own).any(2).all(1)
    chooses_image = np.full(len(cosines), cosines.shape[1] > 1)
    of_pictures = _nearest(cosines, own)  # pictures share no score, so their chances multiply
    of_captions = _nearest(cosines.swapaxes(1, 2), own.swapaxes(1, 2))
    text = np.where(chooses_text, of_pictures.prod(1), np.nan)
    image = np.where(chooses_image, np.where(owner >= 0, of_captions, 1).prod(1), np.nan)
    group = text * image
    for q in np.flatnonzero((group > 0) & (group < 1)):  # a picture and a caption share a score: try the orders
        group[q] = _both(cosines[q], owner[q])
    return np.stack([text, image, group])


def _nearest(cosines: Float[np.ndarray, "*q k"], own: Bool[np.ndarray, "*q k"]) -> Float[np.ndarray, "*q"]:
    """The chance that the nearest key is an own one."""
    greater, equal = nearer(cosines, np.where(own, cosines, -np.inf).max(-1, keepdims=True))
    return np.asarray(expected_hits((greater & ~own).sum(-1), (equal & ~own).sum(-1), (equal & own).sum(-1), 1))


def _both(cosines: Float[np.ndarray, "i c"], owner: Int[np.ndarray, " c"]) -> float:
    """The chance, over the orders of tied scores, that every picture is nearest to an own caption and every caption to its own
    picture."""
    n, shape = cosines.size, cosines.shape
    rng = np.random.default_rng(0)
    orders = np.array(list(itertools.permutations(range(n))) if n <= MOST else [rng.permutation(n) for _ in range(ORDERS)])
    greater, equal = nearer(cosines.reshape(1, n), cosines.reshape(n, 1))  # [a, b]: b is above a
    above = greater | (equal & (orders[:, None, :] > orders[:, :, None]))
    above = above.reshape(len(orders), *shape, *shape)  # [order, picture, caption, other picture, other caption]
    holds = np.ones(len(orders), bool)
    for i in range(shape[0]):
        mine, others = np.flatnonzero(owner == i), np.flatnonzero(owner != i)
        lost = np.any(above[:, i][:, mine][:, :, i][:, :, others], axis=-1)  # [order, own caption]
        holds &= ~np.all(lost, axis=-1)
    for c in np.flatnonzero(owner >= 0):
        holds &= ~above[:, int(owner[c]), int(c), :, int(c)].any(1)
    return float(holds.mean())


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    """Of those that are there."""
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else None


def _tell(name: str, questions: Sequence[Question], blocks: Sequence[Block], tokens: Int[np.ndarray, "m t"]) -> None:
    """Prints the first question, and warns, in the first process, of those with captions of the same tokens."""
    say(f"{name}: {len(questions):,} questions; the captions of the first are {', '.join(map(repr, questions[0].captions))}")
    _, same = np.unique(tokens, axis=0, return_inverse=True)
    ordered = [np.sort(same[block.captions], axis=1) for block in blocks]
    equal = sum(int((np.diff(rows, axis=1) == 0).any(1).sum()) for rows in ordered)
    if equal and jax.process_index() == 0:
        log.warning("%s: in %d of %d questions captions have the same tokens: that is a tie", name, equal, len(questions))
