"""Retrieval by a picture and a text together: the query is the normalised sum of their vectors, the text's with a weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int

from clipjax import config
from clipjax.config.tasks import with_questions
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.choice import Embed
from clipjax.evals.compositions import Composition, read_compositions, skin_tones
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Results
from clipjax.evals.inputs import caption_batches, image_batches
from clipjax.evals.named import keys_of, located
from clipjax.evals.ties import expected_hits, nearer
from clipjax.models.clip import Params
from clipjax.train.report import say

KS = (1, 2, 3, 5, 10)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the curve
AT_ONCE = 1 << 22  # cosines
Mix = tuple[float, float]  # the weights of the picture and of the text in a query


@dataclass(frozen=True)
class Asked:
    """Questions, and where the pictures are that they name."""

    dataset: str
    sources: Sequence[Source]  # whose images, together, are searched
    questions: Sequence[Composition]
    pictures: Sequence[Int[np.ndarray, " p"]]  # of each question, in the order of its `pictures`: their numbers among all images


class ComposedEvaluation(Evaluation):
    """Questions of a picture and a text, answered by pictures."""

    def __init__(self, images: Sequence[Embed], texts: Embed, asked: Asked, numbers: dict[str, int], weight: float) -> None:
        """`images`: each embeds those of one source of `asked`. `numbers`: of the texts, as `texts` embeds them."""
        self._images, self._texts, self._asked, self.weight, self.dataset = images, texts, asked, weight, asked.dataset
        self.questions = asked.questions
        self._conditions = np.array([numbers[question.condition] for question in self.questions])
        self._sources = np.array([-1 if question.source is None else numbers[question.source] for question in self.questions])

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Composed) -> Self:
        """Without a file of questions, those of emoji's skin tones: of the targets in `data.split`, among all emoji."""
        asked = of_emoji(data) if cfg.questions is None else of_file(data, cfg.questions)
        first = asked.questions[0]
        say(f"{asked.dataset}: {len(asked.questions):,} questions; the first is {first.condition!r}, of {first.reference.name}")
        texts = list(dict.fromkeys(text for q in asked.questions for text in (q.condition, q.source) if text is not None))
        captions = caption_batches(encoder, tokenizer, texts, range(len(texts)), asked.dataset)
        images = [(image_batches(encoder, source, data, captioned=False), len(source)) for source in asked.sources]
        embeds = [partial(by_index, encoder, batches=batches, n=n) for batches, n in images]
        embed_texts = partial(by_index, encoder, batches=captions, n=len(texts))
        return cls(embeds, embed_texts, asked, {text: i for i, text in enumerate(texts)}, cfg.weight)

    def run(self, params: Params) -> Results:
        """`recall@K`: how often a target is among the K nearest to unit(x + weight (t - s)), with the unit vectors of the
        reference x, the condition t and, where a question has one, the source s. The reference itself is never found.

        `picture_alone_recall@1` and `text_alone_recall@1` are of x and of t - s alone; `recall@1_by_weight` is the curve over
        `weights`. A question whose reference, or whose targets, can't be read does not count."""
        found = [embed(params) for embed in self._images]
        z, readable = np.concatenate([z for z, _ in found]), np.concatenate([readable for _, readable in found])
        t, _ = self._texts(params)
        mixes: list[Mix] = [(1, self.weight), (1, 0), (0, 1), *((1, weight) for weight in WEIGHTS)]
        portions = np.array_split(np.arange(len(self.questions)), -(-len(self.questions) * len(z) // AT_ONCE))  # for the memory
        hits = np.concatenate([self._hits(part, z, readable, t, mixes) for part in portions], axis=2)
        weights = np.array([question.weight for question in self.questions])
        counts = ~np.isnan(hits[0, 0])
        hits *= weights * counts.sum() / max(weights[counts].sum(), 1e-30)  # then the mean over the questions is the weighted one
        recalls = np.nanmean(hits, axis=2) if counts.any() else np.full(hits.shape[:2], np.nan)
        config.require(bool(counts.any()), "questions", self.dataset, "no question has a picture that can be read")
        by_k = {f"recall@{k}": float(recalls[0, i]) for i, k in enumerate(KS)}
        alone = {"picture_alone_recall@1": float(recalls[1, 0]), "text_alone_recall@1": float(recalls[2, 0])}
        curve = {"weights": list(WEIGHTS), "recall@1_by_weight": recalls[3:, 0].tolist()}
        keys, groups = [q.key for q in self.questions], [q.reference.name for q in self.questions]
        return Results(by_k | alone | curve, examples=[Examples(keys, dict(zip(by_k, hits[0], strict=True)), groups)])

    def _hits(
        self, part: Int[np.ndarray, " q"], z: Vectors, readable: Bool[np.ndarray, " n"], t: Vectors, mixes: Sequence[Mix]
    ) -> Float[np.ndarray, "m k q"]:
        """For each mix and each of KS, the expected hit of each question of a part; NaN where it does not count."""
        own, searched = self._search(part, len(z))
        reference = np.array([self._asked.pictures[q][0] for q in part])
        counts = readable[reference] & ((own & readable).any(1) | ~own.any(1))
        searched &= readable
        searched[np.arange(len(part)), reference] = False
        own, others = own & searched, searched & ~own
        x, sources = z[reference], self._sources[part]
        delta = t[self._conditions[part]] - np.where(sources[:, None] >= 0, t[sources], 0)
        of_picture, of_text = x @ z.T, delta @ z.T
        hits = np.full((len(mixes), len(KS), len(part)), np.nan)
        for m, (a, b) in enumerate(mixes):
            length = np.maximum(np.linalg.norm(a * x + b * delta, axis=1, keepdims=True), 1e-30)
            cosines = (a * of_picture + b * of_text) / length
            above, equal = nearer(cosines, np.where(own, cosines, -np.inf).max(1, keepdims=True))
            greater, tied, mine = (np.sum(which, axis=1) for which in (above & others, equal & others, equal & own))
            hits[m] = [np.asarray(expected_hits(greater, tied, mine, k)) for k in KS]
        return np.where(counts, hits, np.nan)

    def _search(self, part: Int[np.ndarray, " q"], n: int) -> tuple[Bool[np.ndarray, "q n"], Bool[np.ndarray, "q n"]]:
        """Of n images, which are targets of each question, and which are searched."""
        own, searched = np.zeros((2, len(part), n), bool)
        for row, q in enumerate(part.tolist()):
            question, pictures = self.questions[q], self._asked.pictures[q]
            own[row, pictures[1 : 1 + len(question.targets)]] = True
            searched[row, slice(None) if question.gallery is None else pictures[1:]] = True
        return own, searched


def of_emoji(data: config.Data) -> Asked:
    """Those of the skin tones: targets are in `data.split`, and all emoji are searched. Raises ConfigError for other data."""
    remedy = "has no questions of its own: name a file of them (questions; --questions)"
    config.require(data.spec == "emoji", "data.spec", data.spec, remedy)
    sources = [open_source(replace(data, split=split)) for split in ("train", "test")]
    keys = [key for source in sources for key in keys_of(source)]
    place = {key: i for i, key in enumerate(keys)}
    questions = skin_tones(place.keys(), keys_of(open_source(data)))
    config.require(bool(questions), "data.split", data.split, "no emoji of it has a skin tone")
    pictures = [np.array([place[name] for name, _ in question.pictures]) for question in questions]
    return Asked(data.name, sources, questions, pictures)


def of_file(data: config.Data, file: str) -> Asked:
    """Those of a file, about the images of `data`. Raises ConfigError as `read_compositions` and `located` do."""
    source, questions = open_source(data), read_compositions(file)
    shown, numbers = located(source, keys_of(source), [picture for question in questions for picture in question.pictures])
    ends = np.cumsum([len(question.pictures) for question in questions])
    return Asked(with_questions(source.name, file), [shown], questions, np.split(np.array(numbers), ends[:-1]))
