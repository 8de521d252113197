"""How close generated captions are to what people wrote about the same images.

BLEU and chrF are sacrebleu's, CIDEr is the COCO caption evaluation's. They are None where the extra `captions` is not installed.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from clipjax.data.captions import normalise

PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "cider": "pycocoevalcap"}  # that each metric needs
INSTALL = "pip install 'clipjax[captions]'"

References = Sequence[Sequence[str]]  # one or more for each image


def missing() -> dict[str, str]:
    """The metrics that can't be computed here, each with the package that is not installed."""
    return {metric: package for metric, package in PACKAGES.items() if importlib.util.find_spec(package) is None}


def exact_match(captions: Sequence[str], references: References) -> float:
    """Share, in [0, 1], of captions that equal one of their image's references.

    They are compared as `data.captions.normalise` gives them: without case, punctuation and extra white space.
    """
    hits = [normalise(c) in set(map(normalise, several)) for c, several in zip(captions, references, strict=True)]
    return sum(hits) / len(hits)


def bleu(captions: Sequence[str], references: References) -> float | None:
    """sacrebleu's corpus BLEU, 0 to 100, lower-cased: up to 4-grams, tokens of mteval-v13a, exponential smoothing."""
    if importlib.util.find_spec("sacrebleu") is None:
        return None
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(lowercase=True).corpus_score(list(captions), _streams(references)).score


def chrf(captions: Sequence[str], references: References) -> float | None:
    """sacrebleu's corpus chrF2, 0 to 100, lower-cased: up to 6 characters, no words."""
    if importlib.util.find_spec("sacrebleu") is None:
        return None
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(lowercase=True).corpus_score(list(captions), _streams(references)).score


def cider(captions: Sequence[str], references: References) -> float | None:
    """CIDEr-D (1411.5726), 0 to 10, as the COCO caption evaluation computes it, but without its Java tokenizer. Papers print a
    hundred times the value.

    Words are in lower case, split at white space and at punctuation, which is dropped (`data.captions.normalise`). n-grams
    have 1 to 4 words, each length counts a quarter, and a caption of fewer than four words has no n-grams of the longer
    lengths: even an exact match then scores less than 10. An n-gram weighs more the fewer images have it in their references,
    so that a single image has no score: None.
    """
    if importlib.util.find_spec("pycocoevalcap") is None or len(captions) < 2:
        return None
    from pycocoevalcap.cider.cider import Cider

    generated = {i: [normalise(c)] for i, c in enumerate(captions)}
    expected = {i: [normalise(c) for c in several] for i, several in enumerate(references)}
    return float(Cider().compute_score(expected, generated)[0])


def _streams(references: References) -> list[list[Any]]:
    """All first references, all second ones, and so on. None where an image has fewer: sacrebleu takes it, its types do not."""
    most = max(map(len, references))
    return [[several[k] if k < len(several) else None for several in references] for k in range(most)]
