"""Prompt templates and class names for zero-shot classification."""

from clipjax.config import ConfigError
from clipjax.evals.names.sets import class_sets, template_sets
from clipjax.files import as_path

# The 7 of OpenAI's 80 prompts for ImageNet that its notebook found to do nearly as well (github.com/openai/CLIP,
# notebooks/Prompt_Engineering_for_ImageNet.ipynb), in the wording and order of open_clip's zero_shot_metadata.py.
SIMPLE = (
    *("itap of a {c}.", "a bad photo of the {c}.", "a origami {c}.", "a photo of the large {c}.", "a {c} in a video game."),
    *("art of the {c}.", "a photo of the small {c}."),
)
OWN = {"simple": SIMPLE, "plain": ("{c}",)}


def templates(name: str) -> tuple[str, ...]:
    """The templates called `simple` (7), `plain` (the class name alone) or `imagenet` (OpenAI's 80), those of a test set by its
    name in `names.sets`, or those of a file, one a line.

    Each holds `{c}` in the place of the class name. Raises ConfigError for a file that can't be read or a line without `{c}`.
    """
    known = OWN | template_sets()
    if found := known.get("imagenet1k" if name == "imagenet" else name):
        return found
    sets = ", ".join(template_sets())
    lines = _lines("templates", name, f"use imagenet, simple, plain, a set's ({sets}), or a file with one template a line")
    for number, line in enumerate(lines, 1):
        if "{c}" not in line:
            raise ConfigError(f"templates = {name!r}: line {number}, {line!r}, lacks {{c}}: write it where the class name goes")
    return lines


def classnames(file: str) -> tuple[str, ...]:
    """The class names of a file, one a line; line i, from 0, names label i. Raises ConfigError for a file without them."""
    lines = _lines("classnames", file, f"use a file with one class name a line, or a set's: {', '.join(class_sets())}")
    for number, line in enumerate(lines, 1):
        if not line:
            raise ConfigError(f"classnames = {file!r}: line {number} is empty: every line names the class of that label")
    return lines


def fill(template: str, name: str) -> str:
    """The prompt for a class. Other braces are kept."""
    return template.replace("{c}", name)


def _lines(field: str, file: str, remedy: str) -> tuple[str, ...]:
    try:
        text = as_path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(f"{field} = {file!r}: {reason}: {remedy}") from e
    lines = tuple(line.strip() for line in text.rstrip().splitlines())
    if not lines:
        raise ConfigError(f"{field} = {file!r}: the file is empty: {remedy}")
    return lines
