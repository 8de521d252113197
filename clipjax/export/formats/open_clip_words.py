"""The tokenizer that open_clip 3.3 takes for a folder (factory.py `get_tokenizer`), as ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers

from clipjax.config import Clean, ConfigError, TextTower, require
from clipjax.data.clean import SIGMA
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.formats import vocabulary

CLIP_WORDS = 49408  # of CLIP's own tokenizer
# What open_clip does to a string before it is tokenized, as `tokenizer.clean`; by `tokenizer_kwargs.clean`. `lower` also lowers.
CLEAN: dict[str, Clean] = {"canonicalize": "canonicalize", "whitespace": "web", "lower": "web"}
PAD = 0  # with which its own tokenizer pads: an exclamation mark to CLIP's vocabulary


def read(folder: Path, given: Mapping[str, Any], text: TextTower, file: Path | None) -> Tokenizer:
    """The tokenizer of a folder, with its cleaning. `given`: the `text_cfg`; `file`: the user's own, None for the folder's.

    Without `hf_tokenizer_name` it is open_clip's own, whatever the folder holds, where the text tower has as many tokens.
    Raises ConfigError for a tokenizer that is missing, or that does what clipjax can't."""
    mode, name = given.get("tokenizer_mode"), given.get("hf_tokenizer_name")
    options = {key: value for key, value in (given.get("tokenizer_kwargs") or {}).items() if value is not None}
    require(not mode, "text_cfg.tokenizer_mode", mode, "clipjax has nothing like it")
    cleaning = options.pop("clean", "whitespace" if name else "lower")
    require(cleaning in CLEAN, "text_cfg.tokenizer_kwargs.clean", cleaning, f"must be {', '.join(CLEAN)}")
    strip = options.pop("strip_sep_token", False)
    for key, value in options.items():
        require(value is False, f"text_cfg.tokenizer_kwargs.{key}", value, "clipjax has nothing like it")
    clean, pad = CLEAN[cleaning], None if name else PAD
    if file is not None:
        words = vocabulary.from_file(file, text.length, clean, pad)
    elif name:
        words = _of_folder(folder, text.length, clean, str(name))
    else:
        require(cleaning != "whitespace", "text_cfg.tokenizer_kwargs.clean", cleaning, "CLIP's tokenizer has no capital letters")
        words = _own(folder, text, clean)
    if cleaning == "lower":
        _lower(words)
    return vocabulary.without_end(words) if strip else words


def _of_folder(folder: Path, length: int, clean: Clean, name: str) -> Tokenizer:
    try:
        return vocabulary.from_folder(folder, length, clean)
    except ConfigError as error:
        raise ConfigError(f"{error}; its configuration says {name}: give that one's with --tokenizer FILE") from error


def _own(folder: Path, text: TextTower, clean: Clean) -> Tokenizer:
    """open_clip's own tokenizer; that of the folder for other vocabularies, and where open_clip is not installed."""
    try:
        words = vocabulary.clip_bpe(text.length, clean, PAD)
    except ConfigError:
        return vocabulary.from_folder(folder, text.length, clean, PAD)
    if text.vocab_size != CLIP_WORDS and (folder / "tokenizer.json").is_file():
        return vocabulary.from_folder(folder, text.length, clean, PAD)
    return words


def _lower(words: Tokenizer) -> None:
    own = [] if words.backend.normalizer is None else [words.backend.normalizer]
    lower = [normalizers.Replace(Regex(SIGMA[0]), SIGMA[1]), normalizers.Lowercase()]
    words.backend.normalizer = normalizers.Sequence([*lower, *own])
