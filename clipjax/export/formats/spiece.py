"""A SentencePiece model as a tokenizer of Hugging Face: SigLIP's (unigrams, T5's or mT5's) and SigLIP 2's (BPE, Gemma's)."""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from clipjax.config import ConfigError, require
from clipjax.data.tokenizer import SENTINEL

# sentencepiece_model.proto of google/sentencepiece: the numbers of fields, and the kinds of pieces and of models.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
KIND, SUFFIXES, BYTE_FALLBACK, UNKNOWN_ID, END_ID, PAD_ID = 3, 24, 35, 40, 42, 43
CHARSMAP, DUMMY_PREFIX, SINGLE_SPACES, ESCAPES = 2, 3, 4, 5
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # wire types


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a .model file says, as far as it changes ids."""

    pieces: list[Piece]
    unigram: bool
    byte_fallback: bool
    unknown: int  # ids
    end: int
    pad: int  # -1: it has none
    charsmap: bytes
    dummy_prefix: bool  # a space goes before a text
    single_spaces: bool  # none at the ends, none doubled


def read(file: Path) -> Model:
    """Raises ConfigError for a file that is no SentencePiece model, and for one whose ids a tokenizer.json can't give."""
    try:
        return _model(file)
    except ConfigError:
        raise
    except (ValueError, IndexError, struct.error) as error:
        raise ConfigError(f"tokenizer = {str(file)!r}: is not a SentencePiece model: {error}") from error


def _model(file: Path) -> Model:
    parts: dict[int, list] = {}
    for number, value in _fields(file.read_bytes()):
        parts.setdefault(number, []).append(value)
    pieces = [_piece(dict(_fields(part))) for part in parts.get(PIECES, [])]
    trainer, spec = (dict(_fields(parts[name][-1])) if name in parts else {} for name in (TRAINER, NORMALIZER))
    kind, end = trainer.get(KIND, UNIGRAM), _signed(trainer.get(END_ID, 2))

    def carried(holds: bool, what: str) -> None:
        require(holds, "tokenizer", str(file), f"{what}: a tokenizer.json can't give its ids; name a tokenizer.json")

    while pieces and pieces[-1].kind == DEFINED and SENTINEL.fullmatch(pieces[-1].text):
        pieces.pop()
    if not pieces:
        raise ValueError("it has no pieces")
    carried(kind in (UNIGRAM, BPE), "it splits by words or by characters")
    carried(not trainer.get(SUFFIXES, 0) and bool(spec.get(ESCAPES, 1)), "it does not mark the beginning of a word")
    carried(all(piece.kind != UNUSED for piece in pieces), "it has pieces that it does not use")
    carried(0 <= end < len(pieces), "it has no end token")
    prefix, defined = bool(spec.get(DUMMY_PREFIX, 1)), any(piece.kind == DEFINED for piece in pieces)
    carried(kind == UNIGRAM or not (defined and prefix), "it puts a space before a text and has symbols of its user")
    return Model(
        pieces,
        unigram=kind == UNIGRAM,
        byte_fallback=bool(trainer.get(BYTE_FALLBACK, 0)),
        unknown=_signed(trainer.get(UNKNOWN_ID, 0)),
        end=end,
        pad=_signed(trainer.get(PAD_ID, -1)),
        charsmap=spec.get(CHARSMAP, b""),
        dummy_prefix=prefix,
        single_spaces=bool(spec.get(SINGLE_SPACES, 1)),
    )


def _piece(fields: dict) -> Piece:
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b"").decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message in protobuf's wire format: numbers as integers, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (DOUBLE, BYTES, FLOAT):
            raise ValueError(f"byte {at} begins no field")
        size, at = _varint(data, at) if wire == BYTES else ({DOUBLE: 8, FLOAT: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where the next field begins."""
    value = 0
    for shift in itertools.count(0, 7):
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise AssertionError


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def backend(model: Model) -> tokenizers.Tokenizer:
    """The ids that SentencePiece gives, then the end token. Control pieces are special tokens: their strings in a text are text.

    Other ids come, with unigrams, where two splittings have the same score, which SentencePiece's rounding decides; and, with a
    map of characters, where marks stand on a letter in no canonical order, or one on a letter that the map changes."""
    made = tokenizers.Tokenizer(_unigram(model) if model.unigram else _bpe(model))
    made.normalizer = normalizers.Sequence(_normalizers(model))
    if model.unigram and model.byte_fallback:  # the string `<0x41>` is text, which its first character tells from the piece
        made.pre_tokenizer = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] * model.dummy_prefix
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if not model.unigram:  # SentencePiece looks for its user's symbols in the normalised text
        defined = [piece.text for piece in model.pieces if piece.kind == DEFINED]
        made.add_tokens([AddedToken(text, special=False, normalized=True) for text in defined])
    end = model.pieces[model.end].text
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, model.end)])
    return made


def _unigram(model: Model) -> models.Unigram:
    """Symbols of its user are pieces with the best score: SentencePiece never splits them."""
    scores = [(piece.text, 0.0 if piece.kind == DEFINED else piece.score) for piece in model.pieces]
    return models.Unigram(scores, unk_id=model.unknown, byte_fallback=model.byte_fallback)


def _bpe(model: Model) -> models.BPE:
    """SentencePiece joins any two neighbours whose text is a piece, the best score first."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    joined = {piece.text: piece.score for piece in model.pieces if piece.kind in (NORMAL, DEFINED)}
    ranked = sorted(joined, key=lambda text: (-joined[text], ids[text]))
    splits = ((text[:i], text[i:]) for text in ranked for i in range(1, len(text)))
    merges = [(left, right) for left, right in splits if left in joined and right in joined]
    unknown = model.pieces[model.unknown].text
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def _normalizers(model: Model) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        mapped = normalizers.Precompiled(model.charsmap)
        # The library looks up single characters, SentencePiece the longest match, such as a letter and its accent.
        composes = mapped.normalize_str("e\u0301") == "\xe9"
        steps += [normalizers.NFC(), mapped, normalizers.NFC()] if composes else [mapped]
    if model.single_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    return [*steps, normalizers.Prepend(SPACE)] if model.dummy_prefix else steps
