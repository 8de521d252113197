"""Text to token ids: a byte-level BPE trained on the run's captions, or any tokenizer.json of Hugging Face tokenizers."""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

# The library warns if a process with its threads is forked. The pipeline has workers of its own and does not need the threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipjax.config import Clean, ConfigError, require
from clipjax.data.clean import CURLY, clean, normalizer
from clipjax.files import as_path, write_atomic

PAD, START, END = "<pad>", "<|startoftext|>", "<|endoftext|>"
SMALLEST = 256 + 3  # every byte, and the three tokens above
PAD_NAMES = (PAD, "[PAD]", "<|pad|>")
# T5's, at the end, which no caption has: SigLIP's embeddings have no rows for them.
SENTINEL = re.compile("\u2581?<extra_id_[0-9]+>")
Side = Literal["right", "left"]
LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")  # transformers' classes that pad there, unless `padding_side` says else


class Tokenizer:
    """Encodes captions to rows of equal length: start, text, end, padding. A text that is too long keeps its end token. `side`:
    where the padding is.

    A text is cleaned first (`clean.clean`). The string of a special token in it, as `<|endoftext|>`, is text like any other."""

    side: Side = "right"

    def __init__(self, backend: tokenizers.Tokenizer, pad_id: int | None, length: int, how: Clean = "none") -> None:
        """`pad_id`, None: that of the end token; it may be that of an ordinary token, as CoCa's 0, which is `!`. `length`: tokens
        a row, special ones included. `how`: `tokenizer.clean`. Changes `backend`. Raises ConfigError unless it marks the end of
        a text, or says that nothing does by the post-processor `$A`."""
        self.backend, self.length = backend, length
        self.clean: Clean = how
        marked, bare = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = marked[:at], marked[at + len(bare) :]
        if not self.suffix and (pad_id is None or not _endless(backend)):
            remedy = "give it a post-processor that does, such as TemplateProcessing(single='$A </s>', ...)"
            raise ConfigError(f"tokenizer: nothing marks the end of a text: {remedy}")
        room = length - len(self.prefix) - len(self.suffix)
        require(room > 0, "model.text.length", length, "leaves no room for text between the special tokens")
        self.room = room
        self.pad_id = self.suffix[-1] if pad_id is None else pad_id
        pad = backend.id_to_token(self.pad_id)
        require(pad is not None, "tokenizer", self.pad_id, "it has no token of this id to pad with")
        # One character is text: open_clip's CoCa pads with that of `!`.
        padding = {self.pad_id} if pad is not None and len(pad) > 1 else set()
        self._special = _read_special_as_text(backend, {*padding, *self.prefix, *self.suffix})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled backend, as worker processes get it, forgets how it reads the strings of special tokens."""
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, lowercase: bool, length: int, how: Clean = "none") -> "Tokenizer":
        """A BPE of at most `vocab_size` tokens, from cleaned captions; few give fewer. The same captions give the same tokens.

        The end token has the highest id, by which CLIP's text tower finds it. Padding has id 0. A space is put in front of a
        text, so that a word has the same tokens everywhere. Raises ConfigError for too small a vocabulary."""
        remedy = f"a byte-level BPE needs at least {SMALLEST} (256 bytes and three special tokens)"
        require(vocab_size >= SMALLEST, "model.text.vocab_size", vocab_size, remedy)
        backend = tokenizers.Tokenizer(models.BPE())
        spaces = [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Prepend(" ")]
        # open_clip replaces curly quotes by straight ones before it tokenizes. So a text has the same tokens there and here.
        quotes = [normalizers.Replace(tokenizers.Regex(curly), straight) for curly, straight in CURLY]
        case = [normalizers.Lowercase()] if lowercase else []
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), *quotes, *case, *spaces])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[PAD, START],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((clean(caption, how) for caption in captions), trainer)
        backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        marks = [(token, backend.token_to_id(token)) for token in (START, END)]
        backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
        pad_id = backend.token_to_id(PAD)
        assert pad_id is not None  # it is among the trainer's special tokens
        return cls(backend, pad_id, length, how)

    @classmethod
    def load(cls, path: str | os.PathLike, length: int, how: Clean = "none", pad_id: int | None = None) -> "Tokenizer":
        """Reads a tokenizer.json. Its post-processor defines the start and end tokens. The padding token is `pad_id`, else
        that of its `padding`, else the `pad_token` of a special_tokens_map.json or tokenizer_config.json in the same folder,
        else a token named <pad>, [PAD] or <|pad|>, else the end token. Padding is on the side of `padding`, else of the
        `padding_side` of a tokenizer_config.json, else on the right (with transformers' Gemma tokenizers on the left).

        Raises ConfigError for a file that is missing, is no tokenizer.json, or does not mark the end of a text."""
        path = as_path(path)
        require(path.is_file(), "tokenizer.path", str(path), "there is no such file; give the path of a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as e:  # the library raises nothing more specific
            raise ConfigError(f"tokenizer.path = {str(path)!r}: is not a tokenizer.json of Hugging Face tokenizers: {e}") from e
        beside = files_beside(path.parent)
        pad = padding(backend, beside) if pad_id is None else pad_id
        side = beside.get("padding_side", "right") if backend.padding is None else backend.padding["direction"].lower()
        cut = beside.get("truncation_side", "right") if backend.truncation is None else backend.truncation["direction"].lower()
        require(cut == "right", "tokenizer.path", str(path), "cuts long texts at their beginning: clipjax cuts them at their end")
        backend.no_truncation()
        backend.no_padding()
        backend.normalizer = _without_cleaning(backend.normalizer, how)
        try:
            return cls(backend, pad, length, how).padded(side)
        except ConfigError as e:
            raise ConfigError(f"tokenizer.path = {str(path)!r}: {e}") from e

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json that `load`, transformers and open_clip read. It records the padding token; not the length, and
        not the cleaning, which stands in the run's configuration.

        The file appears complete or not at all."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.enable_padding(direction=self.side, pad_id=self.pad_id, pad_token=backend.id_to_token(self.pad_id))
        with write_atomic(path) as part:
            backend.save(str(part))

    def cleaning(self, how: Clean | None) -> "Tokenizer":
        """The same tokens after another cleaning; None: after its own."""
        other = copy.copy(self)
        other.clean = self.clean if how is None else how
        return other

    def padded(self, side: Side) -> "Tokenizer":
        """The same tokens with the padding on this side."""
        other = copy.copy(self)
        other.side = side
        return other

    def standalone(self) -> tokenizers.Tokenizer:
        """A backend for other libraries, which cleans (as far as `clean.normalizer` can), truncates and pads by itself."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.clean != "none":
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizer(self.clean), *own])
        backend.enable_truncation(self.length)
        pad = dict(pad_id=self.pad_id, pad_token=backend.id_to_token(self.pad_id))
        backend.enable_padding(direction=self.side, length=self.length, **pad)
        return backend

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """n texts -> ids int32 [n, length], and whether each text was truncated, bool [n]."""
        cleaned = [clean(text, self.clean) for text in texts]
        bodies = [e.ids for e in self.backend.encode_batch_fast(cleaned, add_special_tokens=False)]
        ids = np.full((len(bodies), self.length), self.pad_id, np.int32)
        for row, body in zip(ids, bodies, strict=True):
            tokens = [*self.prefix, *body[: self.room], *self.suffix]
            row[slice(len(tokens)) if self.side == "right" else slice(self.length - len(tokens), None)] = tokens
        return ids, np.array([len(body) > self.room for body in bodies], bool)

    def tokens(self, text: str) -> int:
        """How many tokens a text has without truncation, special ones included."""
        body = self.backend.encode(clean(text, self.clean), add_special_tokens=False).ids
        return len(self.prefix) + len(body) + len(self.suffix)

    def names_special(self, text: str) -> bool:
        """Whether the text has the string of a special token in it, at which other programs may cut it."""
        return self._special.search(text) is not None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to its end token."""
        ids = [int(i) for i in ids]
        real = [i for i, token in enumerate(ids) if token != self.pad_id]
        ids = ids[(real or [0])[0] if self.side == "left" else 0 : real[-1] + 1 if real else 0][len(self.prefix) :]
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.backend.decode(ids, skip_special_tokens=True).strip()

    @property
    def start_id(self) -> int | None:
        """None where a text has no start token (SigLIP, T5)."""
        return self.prefix[0] if self.prefix else None

    @property
    def end_id(self) -> int:
        """The padding's where nothing marks the end of a text."""
        return self.suffix[-1] if self.suffix else self.pad_id

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, T5's sentinels apart: the smallest number of rows of an embedding table."""
        ids = self.backend.get_vocab(with_added_tokens=True)
        return max(i for token, i in ids.items() if not SENTINEL.fullmatch(token)) + 1


def _read_special_as_text(backend: tokenizers.Tokenizer, marks: Iterable[int]) -> re.Pattern[str]:
    """Makes `backend` read the strings of special tokens in a text as text; a pattern for them. `marks`: ids of those that
    are special even if the tokenizer.json does not say so."""
    known = backend.get_added_tokens_decoder()
    unmarked = [i for i in sorted(marks) if i not in known or not known[i].special]
    backend.add_special_tokens([AddedToken(backend.id_to_token(i), special=True, normalized=False) for i in unmarked])
    backend.encode_special_tokens = True
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def encoded() -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(list(special), add_special_tokens=False)]

    before, own = encoded(), backend.pre_tokenizer
    whole = [s for (s, i), ids in zip(special.items(), before, strict=True) if i in ids and len(s) > 1]
    if whole:  # the model itself has the string, as a unigram model has `</s>`: it is split after its first character
        split = "|".join(f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in whole)
        parts = [*([] if own is None else [own]), pre_tokenizers.Split(Regex(split), "merged_with_previous")]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        if encoded() == before:  # unknown characters have that id, too
            backend.pre_tokenizer = own
    return re.compile("|".join(map(re.escape, special)))


def _without_cleaning(own: normalizers.Normalizer | None, how: Clean) -> normalizers.Normalizer | None:
    """A normalizer without the cleaning that `standalone` puts before it: `clean` does the same in a fraction of the time."""
    if how == "none" or not isinstance(own, normalizers.Sequence):
        return own
    parts, cleaning = (json.loads(part.__getstate__())["normalizers"] for part in (own, normalizer(how)))
    if parts[: len(cleaning)] != cleaning:
        return own
    rest = normalizers.Sequence([])
    rest.__setstate__(json.dumps({"type": "Sequence", "normalizers": parts[len(cleaning) :]}).encode())
    return rest


def _endless(backend: tokenizers.Tokenizer) -> bool:
    """Whether the post-processor is a template that says that nothing marks the end of a text."""
    template = json.loads(backend.to_str())["post_processor"] or {}
    return template.get("type") == "TemplateProcessing" and "Sequence" in template["single"][-1]


def _named(beside: Mapping[str, Any], role: str) -> str | None:
    token = beside.get(f"{role}_token")
    return token.get("content") if isinstance(token, dict) else token


def files_beside(folder: Path) -> dict[str, Any]:
    """What transformers' files beside a tokenizer say: those of special_tokens_map.json, else of tokenizer_config.json."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    said = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    fields = {key: value for one in said for key, value in one.items()}
    left = str(fields.get("tokenizer_class")).removesuffix("Fast") in LEFT
    return dict(padding_side="left" if left else "right") | fields


def padding(backend: tokenizers.Tokenizer, beside: Mapping[str, Any]) -> int | None:
    """The id of the padding token. `beside`: `files_beside`. None: nothing says it."""
    if backend.padding is not None:
        return backend.padding["pad_id"]
    token = _named(beside, "pad")
    if token is not None and backend.token_to_id(token) is not None:
        return backend.token_to_id(token)
    return next((i for i in map(backend.token_to_id, PAD_NAMES) if i is not None), None)
