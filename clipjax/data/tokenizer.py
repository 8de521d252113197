"""Text to token ids: a byte-level BPE trained on the run's captions, or any tokenizer.json of Hugging Face tokenizers."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# The library warns if a process with its threads is forked. The pipeline has workers of its own and does not need the threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipjax.config import ConfigError, require
from clipjax.files import as_path, write_atomic

PAD, START, END = "<pad>", "<|startoftext|>", "<|endoftext|>"
SMALLEST = 256 + 3  # every byte, and the three tokens above
CURLY = (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'))
PAD_NAMES = (PAD, "[PAD]", "<|pad|>")


class Tokenizer:
    """Encodes captions to rows of equal length: start, text, end, padding. A text that is too long keeps its end token."""

    def __init__(self, backend: tokenizers.Tokenizer, pad_id: int, length: int) -> None:
        """`length`: tokens a row, special ones included. Raises ConfigError unless the backend marks the end of a text."""
        self.backend, self.pad_id, self.length = backend, pad_id, length
        marked, bare = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = marked[:at], marked[at + len(bare) :]
        if not self.suffix:
            remedy = "give it a post-processor that does, such as TemplateProcessing(single='$A </s>', ...)"
            raise ConfigError(f"tokenizer: nothing marks the end of a text: {remedy}")
        room = length - len(self.prefix) - len(self.suffix)
        require(room > 0, "model.text.length", length, "leaves no room for text between the special tokens")
        self.room = room

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, lowercase: bool, length: int) -> "Tokenizer":
        """A BPE of at most `vocab_size` tokens; few captions give fewer. The same captions give the same tokens.

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
        backend.train_from_iterator(captions, trainer)
        backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        marks = [(token, backend.token_to_id(token)) for token in (START, END)]
        backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
        pad_id = backend.token_to_id(PAD)
        assert pad_id is not None  # it is among the trainer's special tokens
        return cls(backend, pad_id, length)

    @classmethod
    def load(cls, path: str | os.PathLike, length: int) -> "Tokenizer":
        """Reads a tokenizer.json. Its post-processor defines the start and end tokens. The padding token is that of its
        `padding`, else the `pad_token` of a special_tokens_map.json or tokenizer_config.json in the same folder, else a token
        named <pad>, [PAD] or <|pad|>, else the end token.

        Raises ConfigError for a file that is missing, is no tokenizer.json, or does not mark the end of a text."""
        path = as_path(path)
        require(path.is_file(), "tokenizer.path", str(path), "there is no such file; give the path of a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as e:  # the library raises nothing more specific
            raise ConfigError(f"tokenizer.path = {str(path)!r}: is not a tokenizer.json of Hugging Face tokenizers: {e}") from e
        pad = _pad_token(backend, path.parent)
        backend.no_truncation()
        backend.no_padding()
        try:
            tokenizer = cls(backend, 0, length)
        except ConfigError as e:
            raise ConfigError(f"tokenizer.path = {str(path)!r}: {e}") from e
        tokenizer.pad_id = tokenizer.end_id if pad is None else pad
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json that `load`, transformers and open_clip read. It records the padding token, not the length.

        The file appears complete or not at all."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.enable_padding(pad_id=self.pad_id, pad_token=backend.id_to_token(self.pad_id))
        with write_atomic(path) as part:
            backend.save(str(part))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """n texts -> ids int32 [n, length], and whether each text was truncated, bool [n]."""
        bodies = [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids = np.full((len(bodies), self.length), self.pad_id, np.int32)
        for row, body in zip(ids, bodies, strict=True):
            tokens = [*self.prefix, *body[: self.room], *self.suffix]
            row[: len(tokens)] = tokens
        return ids, np.array([len(body) > self.room for body in bodies], bool)

    def tokens(self, text: str) -> int:
        """How many tokens a text has without truncation, special ones included."""
        return len(self.prefix) + len(self.backend.encode(text, add_special_tokens=False).ids) + len(self.suffix)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to its end token."""
        ids = [int(i) for i in ids][len(self.prefix) :]
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.backend.decode(ids, skip_special_tokens=True).strip()

    @property
    def start_id(self) -> int | None:
        """None where a text has no start token (SigLIP, T5)."""
        return self.prefix[0] if self.prefix else None

    @property
    def end_id(self) -> int:
        return self.suffix[-1]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the smallest number of rows of an embedding table."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def _pad_token(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    if backend.padding is not None:
        return backend.padding["pad_id"]
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and backend.token_to_id(token) is not None:
                return backend.token_to_id(token)
    return next((i for i in map(backend.token_to_id, PAD_NAMES) if i is not None), None)
