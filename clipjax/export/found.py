"""What a reader of another library's weights finds, and what its user may say."""

from pathlib import Path
from typing import Any, NamedTuple

from clipjax.config import Model, require
from clipjax.data.images.resize import Resize
from clipjax.data.tokenizer import Tokenizer


class Options(NamedTuple):
    """What a source may leave open."""

    tokenizer: Path | None = None  # a tokenizer.json, or a SentencePiece model; None: that of the source
    image_size: int | None = None  # pixels; None: that of the source


class Found(NamedTuple):
    """A model of another library, as ours."""

    model: Model
    params: dict[str, Any]  # nested as `models.clip.init` gives them, float32
    tokenizer: Tokenizer | None  # with its cleaning; None: of an image tower alone
    resize: Resize
    notes: list[str]  # what is not imported, or differs from the source


def check_tokenizer(words: Tokenizer, model: Model, source: Path) -> None:
    """Raises ConfigError where the tokenizer's ids do not fit the text tower or the captioning head."""
    remedy = f"its weights have {model.text.vocab_size} tokens, and its tokenizer {words.vocab_size}"
    require(words.vocab_size <= model.text.vocab_size, "SRC", str(source), remedy)
    highest = words.vocab_size - 1
    by_id = model.text.pool == "eot" or model.decoder is not None
    remedy = f"its tokenizer's end token must have the highest id, {highest}, and has {words.end_id}: texts end there"
    require(not by_id or words.end_id == highest, "SRC", str(source), remedy)
    remedy = f"its text tower pools at the first token with the id {model.text.eos_id}; its tokenizer's end token: {words.end_id}"
    require(model.text.pool != "eos" or words.end_id == model.text.eos_id, "SRC", str(source), remedy)
