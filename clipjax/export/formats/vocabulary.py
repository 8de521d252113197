"""Tokenizers of other libraries, as ours: a tokenizer.json, a SentencePiece model, or CLIP's vocabulary."""

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from clipjax.config import Clean, require
from clipjax.data.clean import SIGMA
from clipjax.data.tokenizer import END, START, Tokenizer, files_beside, padding
from clipjax.export.formats import spiece

MODELS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")  # SentencePiece's, as they are named on the hub
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's merges, as OpenAI published them
MERGES = 49152 - 256 - 2  # of them CLIP uses so many
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's, in lower case


def clip_bpe(length: int, clean: Clean = "web", pad_id: int | None = None) -> Tokenizer:
    """open_clip's own tokenizer (its tokenizer.py, `SimpleTokenizer`), from the vocabulary that the installed open_clip has.
    `clean`: `web` is its `lower`. `pad_id`: 0 as open_clip pads; None: the end token, as transformers pads.

    Raises ConfigError where open_clip is not installed."""
    found = importlib.util.find_spec("open_clip")
    file = None if found is None or found.origin is None else Path(found.origin).parent / VOCABULARY
    remedy = "CLIP's vocabulary comes with open_clip: `pip install open_clip_torch`, or add a tokenizer.json"
    require(file is not None and file.is_file(), "tokenizer", str(file), remedy)
    assert file is not None
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _bytes()
    names = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    backend = _clip(dict(zip(names, range(len(names)), strict=True)), merges)
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(SIGMA[0]), SIGMA[1]), backend.normalizer])
    return Tokenizer(backend, pad_id, length, clean)


def from_folder(folder: Path, length: int, clean: Clean = "none", pad_id: int | None = None) -> Tokenizer:
    """The tokenizer of a folder: its tokenizer.json, else its SentencePiece model, else its vocab.json and merges.txt (CLIP's).
    `pad_id`: None: what its files say (`Tokenizer.load`).

    Raises ConfigError if it has none, or one that a tokenizer.json can't hold."""
    if (folder / "tokenizer.json").is_file():
        return from_file(folder / "tokenizer.json", length, clean, pad_id)
    model = next((folder / name for name in MODELS if (folder / name).is_file()), None)
    if model is not None:
        return from_file(model, length, clean, pad_id)
    files = folder / "vocab.json", folder / "merges.txt"
    remedy = f"has no tokenizer: a tokenizer.json, {' or '.join(MODELS)}, or vocab.json and merges.txt; add one"
    require(all(file.is_file() for file in files), "SRC", str(folder), remedy)
    vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
    lines = files[1].read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    known = START in vocabulary and END in vocabulary and any(token.endswith("</w>") for token in vocabulary)
    require(known, "SRC", str(folder), "its vocab.json is not CLIP's; add a tokenizer.json")
    return Tokenizer(_clip(vocabulary, merges), pad_id, length, clean)


def from_file(file: Path, length: int, clean: Clean = "none", pad_id: int | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json or of a SentencePiece model. A model's texts have no start token. Its padding is the
    `pad_token` of transformers' files beside it, else the end token for unigrams (SigLIP), the model's own for BPE (SigLIP 2).

    Raises ConfigError if the file is neither, or has what a tokenizer.json can't hold."""
    if file.suffix == ".json":
        return Tokenizer.load(file, length, clean, pad_id)
    require(file.is_file(), "tokenizer", str(file), "there is no such file; name a tokenizer.json or a SentencePiece model")
    model = spiece.read(file)
    backend, beside = spiece.backend(model), files_beside(file.parent)
    if pad_id is None:
        own = model.end if model.unigram or model.pad < 0 else model.pad
        pad_id = padding(backend, beside) if "pad_token" in beside else own
    return Tokenizer(backend, pad_id, length, clean).padded("left" if beside["padding_side"] == "left" else "right")


def cleaning(folder: Path) -> Clean:
    """What transformers' tokenizer of a folder does to a text before its tokenizer.json: `siglip` or `lower`, as SigLIP 2 was
    trained (transformers does so in its class of SigLIP 2; of Gemma's class it leaves that to the user).

    Raises ConfigError where it does something else."""
    beside = files_beside(folder)
    kind = str(beside.get("tokenizer_class")).removesuffix("Fast")
    if kind in ("GemmaTokenizer", "Siglip2Tokenizer"):
        return "lower"
    if kind != "SiglipTokenizer" and (kind != "None" or not (folder / "spiece.model").is_file()):
        return "none"
    lower = beside.get("do_lower_case", True)
    remedy = "in tokenizer_config.json: clipjax removes punctuation together with upper case only; it must be true"
    require(lower is True, "do_lower_case", lower, remedy)
    return "siglip"


def without_end(words: Tokenizer, token: int = 0) -> Tokenizer:
    """The same tokens with this one in the place of the end token: open_clip's `strip_sep_token` (CLIPA) puts 0 there."""
    ids = [*words.prefix, token]
    names = [str(words.backend.id_to_token(i)) for i in ids]
    single = " ".join([*names[:-1], "$A", names[-1]])
    marks = list(dict(zip(names, ids, strict=True)).items())
    words.backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return Tokenizer(words.backend, words.pad_id, words.length, words.clean).padded(words.side)


def _bytes() -> Sequence[str]:
    """The letters that stand for the bytes, in CLIP's order: first those that are printed as they are."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(rest)))]


def _clip(vocabulary: dict[str, int], merges: list) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE, whose words end in `</w>`."""
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    marks = [(token, vocabulary[token]) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    return backend
