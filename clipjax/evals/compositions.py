"""Questions that a picture and a text ask together: the same, but with a dark skin tone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from clipjax.config import ConfigError, require
from clipjax.evals.named import Picture, entries, picture

EMOJI_STYLE = "fe0f"  # in a key where a skin tone may stand instead


@dataclass(frozen=True)
class Composition:
    """Which pictures are like `reference`, but for what `condition` says."""

    key: str
    reference: Picture
    condition: str
    targets: tuple[Picture, ...]  # those that are right; none: whatever is found is wrong
    source: str | None = None  # what `condition` replaces: its vector is subtracted
    gallery: tuple[Picture, ...] | None = None  # among which, and the targets, to search; None: all pictures
    weight: float = 1.0  # with which the question counts

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The reference, the targets, the gallery."""
        return (self.reference, *self.targets, *(self.gallery or ()))


def read_compositions(file: str) -> list[Composition]:
    """The questions of a file: objects with the fields of Composition; `reference`, `condition` and `targets` are needed.

    Raises ConfigError as `entries` does, and for an object that lacks a field or has one that can't be."""
    questions = []
    for key, entry in entries(file):
        try:
            gallery = entry.get("gallery")
            questions.append(
                Composition(
                    str(entry.get("key", key)),
                    picture(entry["reference"]),
                    str(entry["condition"]),
                    tuple(map(picture, entry["targets"])),
                    entry.get("source"),
                    None if gallery is None else tuple(map(picture, gallery)),
                    float(entry.get("weight", 1)),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            form = '{"reference": NAME, "condition": TEXT, "targets": [NAME, ...]}, and may have source, gallery, weight and key'
            raise ConfigError(f"questions = {file!r}: question {key} {what}; it must be {form}") from error
    require(sum(q.weight for q in questions) > 0, "questions", file, "the weights of its questions must add up to more than 0")
    return questions


def skin_tones(keys: Collection[str], wanted: Sequence[str]) -> list[Composition]:
    """For each of the `wanted` keys of emoji with one skin tone: the emoji without it, and the tone's name.

    `keys`: of all pictures."""
    from clipjax.data.sets.emoji import SKIN_TONES, key_of, names_of  # not above: tfds takes long to import

    tones = {key_of(tone): names_of(tone)[0] for tone in SKIN_TONES}
    questions = []
    for key in wanted:
        points = key.split("-")
        found = {point for point in points if point in tones}
        if len(found) != 1:
            continue
        (tone,) = found
        plain = "-".join(point for point in points if point != tone)
        styled = "-".join(EMOJI_STYLE if point == tone else point for point in points)
        reference = next((name for name in (plain, styled) if name in keys), None)
        if reference is not None:
            questions.append(Composition(key, Picture(reference), tones[tone], (Picture(key),)))
    return questions
