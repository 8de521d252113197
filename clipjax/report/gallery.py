"""What runs find: images for a caption, captions for an image, and the captions that they write. Some right, some wrong, chosen
by chance among those of the first run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from clipjax.data.faults import shown
from clipjax.data.source import Source
from clipjax.evals import caption_metrics
from clipjax.evals.captioning import with_round_trips
from clipjax.evals.embed import Pairs
from clipjax.evals.loaded import LoadedRun
from clipjax.evals.ties import nearer
from clipjax.report.drawing import webp

ASKED = 1000  # queries of which right and wrong ones are chosen
BLOCK = 50  # queries that are compared with all examples at once: of a million they take 200 MB
WRONG, RIGHT = 6, 4  # that are shown
NEAREST = 5  # that are shown of what a query found
CAPTIONED = 48  # images that a run writes captions for
SIDE = 96  # pixels of a thumbnail


@dataclass(frozen=True)
class Tile:
    """An example, shown as its image, its caption or both."""

    image: str = ""  # an address
    text: str = ""
    own: bool = False  # it is the query's own
    cosine: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one run found."""

    rank: float  # of the query's own; with ties the mean
    tiles: list[Tile]  # the nearest first


@dataclass(frozen=True)
class Search:
    query: Tile
    answers: list[Answer]  # of each run


@dataclass(frozen=True)
class Writing:
    """An image with its own caption, and the captions that runs wrote."""

    query: Tile
    captions: list[tuple[str, bool]]  # of each run with a decoder, and whether it is right


def searches(source: Source, runs: Sequence[Pairs], by_text: bool) -> list[Search]:
    """Text to image if `by_text`, else image to text. Wrong ones of the first run come first."""
    first = runs[0]
    asked = np.random.default_rng(0).permutation(len(first.number))[:ASKED]
    own = _ranks(first, asked, by_text)
    chosen = [*asked[own > 1][:WRONG].tolist(), *asked[own <= 1][:RIGHT].tolist()]
    numbers = first.number[chosen].tolist()
    places = [{int(number): place for place, number in enumerate(run.number)} for run in runs]
    found = [_nearest(run, [of_run[n] for n in numbers], by_text) for run, of_run in zip(runs, places, strict=True)]
    wanted = sorted({*numbers, *(int(n) for nearest, _, _ in found for n in np.unique(nearest))})
    tiles = {x.number: Tile(webp(x.image, SIDE), x.record.captions[0]) for x in shown(source, wanted)}
    return [
        Search(
            tiles[number] if by_text else Tile(tiles[number].image),  # a text with its image, for the reader
            [_answer(tiles, number, near[i], cosines[i], by_text, ranks[i]) for near, cosines, ranks in found],
        )
        for i, number in enumerate(numbers)
    ]


def _answer(tiles: dict[int, Tile], own: int, nearest: np.ndarray, cosines: np.ndarray, by_text: bool, rank: float) -> Answer:
    shown_as = [(tiles[n].image, "") if by_text else ("", tiles[n].text) for n in nearest.tolist()]
    found = zip(shown_as, nearest.tolist(), cosines.tolist(), strict=True)
    return Answer(float(rank), [Tile(*what, n == own, cosine) for what, n, cosine in found])


def _cosines(run: Pairs, queries: Sequence[int] | np.ndarray, by_text: bool) -> Float[np.ndarray, "q n"]:
    asked, keys = (run.text, run.image) if by_text else (run.image, run.text)
    return asked[queries] @ keys.T


def _ranks(run: Pairs, queries: Int[np.ndarray, " q"], by_text: bool) -> Float[np.ndarray, " q"]:
    """1 + how many are nearer + half of how many are as near."""
    found = []
    for block in np.array_split(queries, -(-len(queries) // BLOCK) or 1):
        cosines = _cosines(run, block, by_text)
        greater, equal = nearer(cosines, np.take_along_axis(cosines, block[:, None], 1))
        found.append(np.asarray(1 + greater.sum(1) + (equal.sum(1) - 1) / 2))
    return np.concatenate(found)


def _nearest(run: Pairs, queries: list[int], by_text: bool) -> tuple[Int[np.ndarray, "q k"], np.ndarray, np.ndarray]:
    """The numbers of the nearest examples in their source, their cosines, and the rank of each query's own."""
    cosines = _cosines(run, queries, by_text)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    return run.number[order], np.take_along_axis(cosines, order, 1), _ranks(run, np.array(queries, int), by_text)


def captioned(source: Source) -> list[int]:
    """The numbers of the examples that runs write captions for."""
    return np.random.default_rng(0).permutation(len(source))[:CAPTIONED].tolist()


def write_captions(model: LoadedRun, source: Source, numbers: Sequence[int]) -> dict[int, tuple[str, bool]]:
    """The greedy caption of each example that has an image and a caption, and whether it is one of its own."""
    found = [x for x in shown(source, numbers) if x.record.captions]
    images: list[Image.Image] = [x.image for x in found]
    accepted = with_round_trips([x.record.captions for x in found], model.tokenizer)
    written = model.caption(images)
    rows = zip(found, written, accepted, strict=True)
    return {x.number: (text, caption_metrics.exact_match([text], [own]) == 1) for x, text, own in rows}


def writings(source: Source, runs: Sequence[dict[int, tuple[str, bool]]]) -> list[Writing]:
    """Some that the first run got wrong, then some that it got right."""
    wrong = [n for n, (_, right) in runs[0].items() if not right][:WRONG]
    right = [n for n, (_, right) in runs[0].items() if right][:RIGHT]
    tiles = {x.number: Tile(webp(x.image, SIDE), x.record.captions[0]) for x in shown(source, [*wrong, *right])}
    return [Writing(tiles[n], [run[n] for run in runs]) for n in (*wrong, *right)]
