"""Why another library may see an image or a string differently, whatever the export: such differences are listed, not judged."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipjax.data.images.resize import Resize
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.captions import may_differ
from clipjax.export.compare.drawn import Drawn
from clipjax.export.compare.reference import Reference
from clipjax.export.compare.report import Compared

MARGIN = "transformers rounds the margins of a centre crop down, clipjax and open_clip to even"
FILTER = "the original resizes images bilinearly, clipjax bicubically"
CLEANED = "open_clip cleans every string, and tokenizer.clean is none; the cleaned string is judged"
SPECIAL = "the string of a special token is text to clipjax, and may end a caption elsewhere"
ENTITY = "the exported tokenizer.json knows the entities of HTML 4 only"


class Strings(NamedTuple):
    """n strings, and their ids [n, t]: ours, ours of the string that the other library cleaned, and the other's."""

    texts: Sequence[str]
    ours: np.ndarray
    cleaned: np.ndarray
    theirs: np.ndarray

    def reasons(self, reference: Reference, words: Tokenizer) -> list[str | None]:
        """Why the other's ids are no failure; None: they equal ours, or should."""
        changed, other = ((ids != self.cleaned).any(axis=1) for ids in (self.ours, self.theirs))
        reasons: list[str | None] = [CLEANED if change else None for change in changed]
        for i in np.flatnonzero(other).tolist():
            text = reference.clean(self.texts[i])
            known = SPECIAL if words.names_special(text) else ENTITY
            reasons[i] = known if may_differ(words, text) else None
        return reasons


def compared(distances: np.ndarray, judged: np.ndarray, reasons: Sequence[str | None], drawn: Sequence[str]) -> list[Compared]:
    """One for each image or string; the last are the drawn ones. `judged`: the distances once the other library has cleaned."""
    names = [None] * (len(reasons) - len(drawn)) + list(drawn)
    counted = [float(figure) if reason in (None, CLEANED) else None for figure, reason in zip(judged, reasons, strict=True)]
    return [Compared(*row) for row in zip(map(float, distances), counted, reasons, names, strict=True)]


def image_reasons(
    reference: Reference, resize: Resize, side: int, images: Sequence[Image.Image], drawn: Sequence[Drawn]
) -> list[str | None]:
    """Why the other library's pixels differ; None: they equal ours, or should. The last images are the drawn ones. `side`: of the
    square that is cropped."""
    if reference.bilinear:
        return [FILTER] * len(images)
    crops = reference.other_crop and resize == "crop"
    reasons = [MARGIN if crops and _other_margin(image.size, side) else None for image in images]
    reasons[len(images) - len(drawn) :] = [
        image.reason or reason for image, reason in zip(drawn, reasons[-len(drawn) :], strict=True)
    ]
    return reasons


def _other_margin(size: tuple[int, int], side: int) -> bool:
    margins = [side * length // min(size) - side for length in size]
    return any(round(margin / 2) != margin // 2 for margin in margins)
