"""What a comparison with PyTorch found, in numbers and in words."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipjax.export.compare.captions import Agreement

LIMIT = 1e-4  # of an embedding's norm


class Compared(NamedTuple):
    """An image or a string that each side took through its own preprocessing or tokenizer. Distances are of unit vectors."""

    distance: float
    judged: float | None  # the distance that must be small: `distance`, or that after the other's cleaning; None: it may be large
    reason: str | None = None  # why `distance` is no failure; None: it would be one
    drawn: str | None = None  # what it is, of those that every comparison draws; None: an example of the run's own


@dataclass(frozen=True)
class Report:
    """The largest differences between our unit vectors and PyTorch's, in float32, over the examples and what is drawn.

    `image` and `text` start from the same pixels and the same token ids: they measure the weights and the arithmetic. `images`
    and `strings` start from PIL images and strings, with each side's own preprocessing and tokenizer. `logits`, and
    `token_logits` of a captioning head, are relative to the largest. `other_captions` counts the images with different greedy
    captions.

    What no export can change is listed with its size and its share, but is no failure: `Compared.reason`. `captions` says how
    many of the run's own get equal ids there. `rounding`: how far weights in half precision move an image's and a text's vector;
    the comparison is with the rounded ones.
    """

    examples: int
    image: float
    text: float
    logits: float
    images: Sequence[Compared]
    strings: Sequence[Compared]
    captions: Agreement | None = None
    token_logits: float | None = None  # of a captioning head
    other_captions: int | None = None
    rounding: tuple[float, float] | None = None

    @property
    def failures(self) -> list[str]:
        """What is above LIMIT; empty if the export is faithful."""
        figures = dict(image=self.image, text=self.text, logits=self.logits)
        figures |= dict(string=_largest(self.strings), image_file=_largest(self.images))
        figures |= {} if self.token_logits is None else dict(token_logits=self.token_logits)
        large = {name: figure for name, figure in figures.items() if not figure <= LIMIT}
        failures = [f"{name} differs by {figure:.1e}, more than {LIMIT:.0e}" for name, figure in large.items()]
        captions = f"greedy captions of {self.other_captions} of {len(self.images)} images differ"
        return failures + [captions] * bool(self.other_captions)

    @property
    def figures(self) -> list[str]:
        """All differences, a line for each kind."""
        lines = [
            f"same pixels and ids: image {self.image:.1e}, text {self.text:.1e}; logits {self.logits:.1e}",
            f"from image file and string: image {_largest(self.images):.1e}, text {_largest(self.strings):.1e}",
        ]
        lines += [] if self.captions is None else [self.captions.figure]
        if self.token_logits is not None and self.other_captions is not None:
            same = len(self.images) - self.other_captions
            equal = f"equal greedy captions {same} of {len(self.images)}"
            lines.append(f"captioning head: logits {self.token_logits:.1e}; {equal}")
        if self.rounding is not None:
            lines.append("rounding of the weights: image {:.1e}, text {:.1e}".format(*self.rounding))
        return lines + [_drawn(item) for item in (*self.images, *self.strings) if item.drawn is not None]

    @property
    def notes(self) -> list[str]:
        """Differences of the run's own examples that are no failures, by reason; often empty."""
        special = [] if self.captions is None else self.captions.notes
        return [*_unjudged("image files", self.images), *_unjudged("strings", self.strings), *special]


def _largest(items: Sequence[Compared]) -> float:
    return float(np.max([item.judged for item in items if item.judged is not None], initial=0.0))  # also what is no number


def _drawn(item: Compared) -> str:
    return f"drawn: {item.drawn} {item.distance:.1e}" + (f", not judged: {item.reason}" if item.reason else "")


def _unjudged(kind: str, items: Sequence[Compared]) -> list[str]:
    """A line for each reason: how many of the run's own there are, their share, and the largest distance."""
    own = [item for item in items if item.drawn is None]
    apart = sorted(((item.reason, item.distance) for item in own if item.reason is not None), key=lambda pair: pair[0])
    lines = []
    for reason, pairs in itertools.groupby(apart, key=lambda pair: pair[0]):
        distances = [distance for _, distance in pairs]
        share = f"{len(distances)} of {len(own)} {kind} ({len(distances) / len(own):.1%})"
        lines.append(f"{share}, which differ by up to {max(distances):.1e}: {reason}")
    return lines
