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
from clipjax.evals.classification import jaccard
from clipjax.evals.disrupted import disrupted
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Metrics, Results
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.evals.named import keys_of, located
from clipjax.evals.questions import Question, read_questions
from clipjax.evals.ties import nearer, own_first
from clipjax.models.clip import Params
from clipjax.train.report import say

SCORES = ("text_score", "image_score", "group_score", "jaccard")
BY_KIND = ("text_score", "jaccard")
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
    own: Bool[np.ndarray, "q i c"]  # which captions are which pictures'


class ChoiceEvaluation(Evaluation):
    """Questions of a few pictures and captions each."""

    def __init__(self, images: Embed, texts: Embed, questions: Sequence[Question], blocks: Sequence[Block], dataset: str) -> None:
        self._images, self._texts = images, texts
        self.questions, self.blocks, self.dataset = questions, blocks, dataset

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Choice) -> Self:
        source = open_source(data)
        if cfg.questions is None:
            shown, numbers, questions = own_captions(source)
        else:
            questions = read_questions(cfg.questions)
            shown, numbers = located(source, keys_of(source), [picture for q in questions for picture in q.pictures])
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
        caption to a picture of its own; `group_score`: both. `jaccard`, where captions alone ask: how much a caption's pictures
        and as many nearest ones overlap. A score that no question has is None.

        `mean_per_kind_SCORE` is the mean over the kinds of questions, and `SCORE_KIND` that of each of a few kinds. A question of
        which a picture can't be read does not count."""
        z, found = self._images(params)
        t, _ = self._texts(params)
        values = np.full((len(SCORES), len(self.questions)), np.nan)
        for block in self.blocks:
            readable = found[block.pictures].all(1)
            cosines = np.einsum("qie,qce->qic", z[block.pictures], t[block.captions])
            values[:, block.places] = np.where(readable, scores(cosines, block.own), np.nan)
        given = dict(zip(SCORES, values, strict=True))
        means: Metrics = {}
        for name in BY_KIND:
            by_kind = self._by_kind(name, given[name])
            if by_kind:
                means[f"mean_per_kind_{name}"] = float(np.mean([np.nanmean(row) for row in by_kind.values()]))
            given |= by_kind if len(by_kind) <= LISTED else {}
        metrics = {name: _mean(row) for name, row in given.items()}
        known = {name: row for name, row in given.items() if metrics[name] is not None}
        groups = [question.pictures[0].name for question in self.questions]
        return Results(metrics | means, examples=[Examples([question.key for question in self.questions], known, groups)])

    def _by_kind(self, name: str, row: Float[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " n"]]:
        """The values of a score at the questions of each kind that has any; NaN at all others."""
        kinds = np.array([question.kind or "" for question in self.questions])
        rows = {f"{name}_{kind}": np.where(kinds == kind, row, np.nan) for kind in sorted({*kinds.tolist()} - {""})}
        return {kind: values for kind, values in rows.items() if _mean(values) is not None}


def own_captions(source: Source) -> tuple[Source, list[int], list[Question]]:
    """The source, and its main captions against disrupted copies: the number of each question's picture, and the questions."""
    records = [(record.key, record.captions[:1]) for record in reading.texts(source, quiet=jax.process_index() > 0)]
    captioned = [i for i, (_, main) in enumerate(records) if main]
    require_captions(source, "this evaluation", bool(captioned))
    found = disrupted([(records[i][0], records[i][1][0]) for i in captioned])
    remedy = f"no caption of {source.name} has words that can be put in another order: name a file of questions"
    config.require(bool(found), "questions", None, remedy)
    return source, [captioned[place] for place, _ in found], [question for _, question in found]


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
            np.array([_matrix(questions[place]) for place in places]),
        )
        for places in shapes.values()
    ]


def _matrix(question: Question) -> Bool[np.ndarray, "i c"]:
    own = np.zeros((len(question.pictures), len(question.captions)), bool)
    for caption, pictures in enumerate(question.own):
        own[list(pictures), caption] = True
    return own


def scores(cosines: Float[np.ndarray, "q i c"], own: Bool[np.ndarray, "q i c"]) -> Float[np.ndarray, "4 q"]:
    """The text, image and group score of each question, and its Jaccard index: what they are on average over the orders of tied
    cosines. NaN: a question does not have the score, because it leaves nothing to choose.

    Of two pictures and two captions a collapsed model scores 1/4, 1/4 and 1/6, which are the chances of guessing."""
    asks_text = np.all(np.any(own, axis=2) & np.any(~own, axis=2), axis=1)
    asks_image = np.any(np.any(own, axis=1) & np.any(~own, axis=1), axis=1)
    of_pictures = own_first(cosines, own)  # pictures share no cosine, so their chances multiply
    of_captions = own_first(cosines.swapaxes(1, 2), own.swapaxes(1, 2))
    text = np.where(asks_text, of_pictures.prod(1), np.nan)
    image = np.where(asks_image, np.where(np.any(own, axis=1), of_captions, 1).prod(1), np.nan)
    group = text * image
    for q in np.flatnonzero((group > 0) & (group < 1)):  # a picture and a caption share a cosine: try the orders
        group[q] = _both(cosines[q], own[q])
    overlap = np.full(len(cosines), np.nan)
    for q in np.flatnonzero(asks_image & ~asks_text):
        overlap[q] = np.mean([jaccard(cosines[q, :, c], own[q, :, c]) for c in np.flatnonzero(own[q].any(0))])
    return np.stack([text, image, group, overlap])


def _both(cosines: Float[np.ndarray, "i c"], own: Bool[np.ndarray, "i c"]) -> float:
    """The chance, over the orders of tied cosines, that every picture is nearest to an own caption, and every caption that has
    one to an own picture."""
    n, shape = cosines.size, cosines.shape
    rng = np.random.default_rng(0)
    orders = np.array(list(itertools.permutations(range(n))) if n <= MOST else [rng.permutation(n) for _ in range(ORDERS)])
    greater, equal = nearer(cosines.reshape(1, n), cosines.reshape(n, 1))  # [a, b]: b is above a
    above = greater | (equal & (orders[:, None, :] > orders[:, :, None]))
    above = above.reshape(len(orders), *shape, *shape)  # [order, picture, caption, other picture, other caption]
    holds = np.ones(len(orders), bool)
    for i, of_picture in enumerate(own):
        lost = above[:, i][:, of_picture][:, :, i][:, :, ~of_picture]  # [order, own caption, other caption]
        holds &= ~np.all(np.any(lost, axis=-1), axis=-1)
    for c in np.flatnonzero(own.any(0)).tolist():
        lost = above[:, :, c][:, own[:, c]][:, :, ~own[:, c], c]  # [order, own picture, other picture]
        holds &= ~np.all(np.any(lost, axis=-1), axis=-1)
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
