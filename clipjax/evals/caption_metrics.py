"""How near captions come to what people wrote of the same pictures.

BLEU and chrF are sacrebleu's, CIDEr is the COCO caption evaluation's; where the extra is not installed they are None.
"""

import importlib.util
from collections.abc import Sequence

from clipjax.data.captions import normalised

PACKAGES = ("sacrebleu", "pycocoevalcap")
INSTALL = "pip install 'clipjax[captions]'"

References = Sequence[Sequence[str]]  # of each picture one or more


def missing() -> list[str]:
    """The packages of the extra `captions` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def exact_match(captions: Sequence[str], references: References) -> float:
    """Share, in [0, 1], of captions that are one of their picture's references, but for what `data.captions.normalised` takes
    away: case, width and composition of letters, punctuation, white space."""
    hits = [normalised(c) in set(map(normalised, several)) for c, several in zip(captions, references, strict=True)]
    return sum(hits) / len(hits)


def bleu(captions: Sequence[str], references: References) -> float | None:
    """sacrebleu's corpus BLEU, 0 to 100, lower-cased: up to 4-grams, tokens of mteval-v13a, exponential smoothing."""
    if importlib.util.find_spec("sacrebleu") is None:
        return None
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase=True).corpus_score(list(captions), _streams(references)).score


def chrf(captions: Sequence[str], references: References) -> float | None:
    """sacrebleu's corpus chrF2, 0 to 100, lower-cased: up to 6 characters, no words."""
    if importlib.util.find_spec("sacrebleu") is None:
        return None
    from sacrebleu.metrics import CHRF

    return CHRF(lowercase=True).corpus_score(list(captions), _streams(references)).score


def cider(captions: Sequence[str], references: References) -> float | None:
    """CIDEr-D (1411.5726), 0 to 10, as the COCO caption evaluation computes it from words that are parted without Java: in lower
    case, at white space and punctuation, which goes (`data.captions.normalised`). Papers print a hundred times the value.

    A picture whose own words are written scores 10 only if there are four of them or more: of n words it has no longer
    n-grams, and these count as 0. Words are weighed by how few pictures' references have them, so one picture alone has no score.
    """
    if importlib.util.find_spec("pycocoevalcap") is None or len(captions) < 2:
        return None
    from pycocoevalcap.cider.cider import Cider

    said = {i: [normalised(c)] for i, c in enumerate(captions)}
    wanted = {i: [normalised(c) for c in several] for i, several in enumerate(references)}
    return float(Cider().compute_score(wanted, said)[0])


def _streams(references: References) -> list[list[str | None]]:
    """All first references, all second ones, ..., None where a picture has fewer."""
    most = max(map(len, references))
    return [[several[k] if k < len(several) else None for several in references] for k in range(most)]
