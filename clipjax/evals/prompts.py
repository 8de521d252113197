"""Prompt templates and class names for zero-shot classification."""

from clipjax.config import ConfigError
from clipjax.files import as_path

# The 80 prompts that OpenAI wrote for ImageNet, and the 7 that its notebook found to do nearly as well (github.com/openai/CLIP,
# notebooks/Prompt_Engineering_for_ImageNet.ipynb), in the wording and order of open_clip's zero_shot_metadata.py.
# fmt: off
IMAGENET = (
    "a bad photo of a {c}.", "a photo of many {c}.", "a sculpture of a {c}.", "a photo of the hard to see {c}.",
    "a low resolution photo of the {c}.", "a rendering of a {c}.", "graffiti of a {c}.", "a bad photo of the {c}.",
    "a cropped photo of the {c}.", "a tattoo of a {c}.", "the embroidered {c}.", "a photo of a hard to see {c}.",
    "a bright photo of a {c}.", "a photo of a clean {c}.", "a photo of a dirty {c}.", "a dark photo of the {c}.",
    "a drawing of a {c}.", "a photo of my {c}.", "the plastic {c}.", "a photo of the cool {c}.", "a close-up photo of a {c}.",
    "a black and white photo of the {c}.", "a painting of the {c}.", "a painting of a {c}.", "a pixelated photo of the {c}.",
    "a sculpture of the {c}.", "a bright photo of the {c}.", "a cropped photo of a {c}.", "a plastic {c}.",
    "a photo of the dirty {c}.", "a jpeg corrupted photo of a {c}.", "a blurry photo of the {c}.", "a photo of the {c}.",
    "a good photo of the {c}.", "a rendering of the {c}.", "a {c} in a video game.", "a photo of one {c}.", "a doodle of a {c}.",
    "a close-up photo of the {c}.", "a photo of a {c}.", "the origami {c}.", "the {c} in a video game.", "a sketch of a {c}.",
    "a doodle of the {c}.", "a origami {c}.", "a low resolution photo of a {c}.", "the toy {c}.", "a rendition of the {c}.",
    "a photo of the clean {c}.", "a photo of a large {c}.", "a rendition of a {c}.", "a photo of a nice {c}.",
    "a photo of a weird {c}.", "a blurry photo of a {c}.", "a cartoon {c}.", "art of a {c}.", "a sketch of the {c}.",
    "a embroidered {c}.", "a pixelated photo of a {c}.", "itap of the {c}.", "a jpeg corrupted photo of the {c}.",
    "a good photo of a {c}.", "a plushie {c}.", "a photo of the nice {c}.", "a photo of the small {c}.",
    "a photo of the weird {c}.", "the cartoon {c}.", "art of the {c}.", "a drawing of the {c}.", "a photo of the large {c}.",
    "a black and white photo of a {c}.", "the plushie {c}.", "a dark photo of a {c}.", "itap of a {c}.", "graffiti of the {c}.",
    "a toy {c}.", "itap of my {c}.", "a photo of a cool {c}.", "a photo of a small {c}.", "a tattoo of the {c}.",
)
SIMPLE = (
    "itap of a {c}.", "a bad photo of the {c}.", "a origami {c}.", "a photo of the large {c}.", "a {c} in a video game.",
    "art of the {c}.", "a photo of the small {c}.",
)
# fmt: on
TEMPLATES = {"imagenet": IMAGENET, "simple": SIMPLE, "plain": ("{c}",)}


def templates(name: str) -> tuple[str, ...]:
    """The templates called `imagenet` (80), `simple` (7) or `plain` (the class name alone), or those of a file, one a line.

    Each holds `{c}` in the place of the class name. Raises ConfigError for a file that can't be read or a line without `{c}`.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    lines = _lines("templates", name, "use imagenet, simple, plain, or a file with one template a line")
    for number, line in enumerate(lines, 1):
        if "{c}" not in line:
            raise ConfigError(f"templates = {name!r}: line {number}, {line!r}, lacks {{c}}: write it where the class name goes")
    return lines


def classnames(file: str) -> tuple[str, ...]:
    """The class names of a file, one a line; line i, from 0, names label i. Raises ConfigError for a file without them."""
    lines = _lines("classnames", file, "use a file with one class name a line")
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
