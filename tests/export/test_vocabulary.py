"""Tokenizers of other libraries give the ids that those libraries give, for strings that are hard to split."""

import itertools
import json
import struct

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from clipjax.config import ConfigError
from clipjax.data.clean import clean
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.folder import _tokenizer_configs
from clipjax.export.formats.vocabulary import cleaning, clip_bpe, from_file, from_folder, without_end
from tests import torch_reference  # noqa: F401

HARD = [
    *("a photo of a cat.", "Two dogs!", "!!a ! b", "", " ", ".", "  lead", "- dash", "tail  ", "a   b", "snake_case it's WE'LL"),
    *("\tx\n\ny", "Tom &amp; Jerry &lt;b&gt;", "\u201cquoted\u201d \u2019s", "caf\u00e9 cafe\u0301 Z\u00fcrich"),
    *(
        "\u0391\u03a3 \u03a3\u0391\u03a3",
        "\uff11\uff12 \uff76\uff9e \u2460\u00bd\u2026 \ufb01",
        "\u65e5\u672c\u8a9e\u732b \uff5e",
    ),
    *("\u1100\u1161 \uac01", "\U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f", "12345 6", "aaaaaaaaaa the the  the"),
    *("a\u2581b \u2581c", "<table> x", "\u0130stanbul", "many words " * 40),
]
SPECIAL = ["x</s>y", "</s>", "<pad> p", "<unk> u", "<0x41>a <0x0A>", "<mask><table>x"]  # text to SentencePiece
CORPUS = 8 * [
    *("a photo of a cat on the table", "the dogs are in the garden with a red ball", "two cats and 12345 dogs, 67890 in all"),
    *("caf\u00e9 in Z\u00fcrich", "\u65e5\u672c\u8a9e\u306e\u732b", "it's a drawing of the small brown house. by the sea!"),
    *("</a> <b>", "abcdefghijklmnopqrstuvwxyz 0123456789"),
]
GEMMA = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", byte_fallback=True)
GEMMA |= dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True)
GEMMA |= dict(
    model_type="bpe", vocab_size=420, user_defined_symbols=["<mask>", "<table>", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"]
)
SIGLIP = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", normalization_rule_name="nmt_nfkc", vocab_size=120)
KINDS = {"siglip": SIGLIP, "i18n": SIGLIP | dict(byte_fallback=True, vocab_size=380), "gemma": GEMMA}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of small SentencePiece models with the settings of SigLIP's and of SigLIP 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    for name, settings in KINDS.items():
        with (folder / f"{name}.model").open("wb") as file:
            train = sentencepiece.SentencePieceTrainer.train
            train(sentence_iterator=iter(CORPUS), model_writer=file, minloglevel=2, hard_vocab_limit=False, **settings)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_models_give_its_ids(trained, kind):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained / f"{kind}.model"))
    ours = from_file(trained / f"{kind}.model", 512)
    assert (ours.pad_id, ours.end_id, ours.start_id) == (0 if kind == "gemma" else 1, 1, None)
    texts = [*HARD, *CORPUS, *SPECIAL]
    for text, row in zip(texts, ours.encode(texts)[0], strict=True):
        ids = theirs.encode(text)
        assert row.tolist() == [*ids, 1, *[ours.pad_id] * (511 - len(ids))], text
    assert ours.decode(ours.encode(["two cats"])[0][0]) == "two cats"


def test_the_siglip_tokenizer_of_transformers(trained, tmp_path):
    from transformers import SiglipTokenizer

    (tmp_path / "spiece.model").write_bytes((trained / "siglip.model").read_bytes())
    theirs = SiglipTokenizer.from_pretrained(tmp_path)
    assert cleaning(tmp_path) == "siglip"
    for length in (16, 64):
        ids = theirs(HARD, padding="max_length", truncation=True, max_length=length)["input_ids"]
        np.testing.assert_array_equal(from_folder(tmp_path, length, "siglip").encode(HARD)[0], ids)
    theirs.save_pretrained(tmp_path)
    ours = from_folder(tmp_path, 64, "siglip")
    assert ours.pad_id == 1
    assert_same_elsewhere(ours, tmp_path / "out", ids)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="SiglipTokenizer", do_lower_case=False)))
    with pytest.raises(ConfigError, match=r"do_lower_case = False: .* it must be true"):
        cleaning(tmp_path)


def gemma_parts():
    """A vocabulary with all bytes and some merges, as the classes of transformers take it."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDZTJ\u2581.,!_'123-"
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("\u2581", "a"), ("\u2581", "c"), ("a", "t"), ("\u2581c", "at"), ("t", "h"), ("th", "e"), ("\u2581", "\u2581")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    return dict(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("marks", [{}, dict(add_eos_token=True, padding_side="right"), dict(add_bos_token=True)])
@pytest.mark.parametrize("called", [False, True])  # after a call the file has `padding` and `truncation`
def test_the_siglip2_tokenizer_of_transformers(tmp_path, marks, called):
    """By itself it pads on the left, and has neither start nor end token."""
    from transformers import Siglip2Tokenizer

    theirs = Siglip2Tokenizer(**gemma_parts(), **marks)
    ids = theirs(HARD, padding="max_length", truncation=True, max_length=64)["input_ids"]
    fresh = theirs if called else Siglip2Tokenizer(**gemma_parts(), **marks)
    fresh.save_pretrained(tmp_path)
    ours = from_folder(tmp_path, 64, cleaning(tmp_path))
    assert ours.clean == "lower"
    np.testing.assert_array_equal(ours.encode(HARD)[0], ids)
    ours.save(tmp_path / "run.json")
    again = Tokenizer.load(tmp_path / "run.json", 64, "lower")
    np.testing.assert_array_equal(again.encode(HARD)[0], ids)
    assert again.decode(again.encode(["The cat"])[0][0]) == "the cat"
    assert_same_elsewhere(again, tmp_path / "out", ids)


def test_gemmas_tokenizer_in_lower_case(tmp_path):
    """As in the folders of SigLIP 2 on the hub, whose models were trained in lower case."""
    from transformers import AutoTokenizer, GemmaTokenizer

    marks = dict(add_bos_token=False, add_eos_token=True, padding_side="right")
    GemmaTokenizer(**gemma_parts(), **marks).save_pretrained(tmp_path)
    lower = [clean(text, "lower") for text in HARD]
    ids = AutoTokenizer.from_pretrained(tmp_path)(lower, padding="max_length", truncation=True, max_length=64)["input_ids"]
    ours = from_folder(tmp_path, 64, cleaning(tmp_path))
    assert (ours.start_id, ours.end_id, ours.side, ours.clean) == (None, 1, "right", "lower")
    np.testing.assert_array_equal(ours.encode(HARD)[0], ours.encode(lower)[0])
    np.testing.assert_array_equal(ours.encode(lower)[0], ids)


def assert_same_elsewhere(ours, folder, ids, texts=HARD):
    """An export's files of the tokenizer give the same ids in transformers and in open_clip."""
    import open_clip
    from transformers import AutoTokenizer

    folder.mkdir()
    ours.standalone().save(str(folder / "tokenizer.json"))
    for name, content in _tokenizer_configs(ours, dict(bos=ours.start_id, eos=ours.end_id, pad=ours.pad_id)).items():
        (folder / name).write_text(json.dumps(content))
    length = dict(padding="max_length", truncation=True, max_length=ours.length)
    np.testing.assert_array_equal(AutoTokenizer.from_pretrained(folder)(texts, **length)["input_ids"], ids)
    plain = [text for text in texts if open_clip.tokenizer.basic_clean(text) == text]  # it cleans every text
    rows = [texts.index(text) for text in plain]
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=ours.length)
    kept = [open_clip.tokenizer.whitespace_clean(text) == text for text in plain]
    np.testing.assert_array_equal(theirs(plain).numpy()[kept], np.asarray(ids)[rows][kept])


@pytest.fixture(scope="module")
def clip():
    return clip_bpe(77, "web", 0)


def test_open_clips_own_tokenizer(clip, tmp_path):
    """Its CoCa pads by id 0, which is `!` too."""
    import open_clip

    texts = [*HARD, "<|endoftext|> cut", "wow!!!"]
    ids = open_clip.tokenizer.SimpleTokenizer()(texts).numpy()
    np.testing.assert_array_equal(clip.encode(texts)[0], ids)
    assert (clip.vocab_size, clip.start_id, clip.end_id, clip.backend.id_to_token(0)) == (49408, 49406, 49407, "!")
    assert not clip.names_special("Two dogs!")
    assert clip.names_special("<|endoftext|> cut")
    clip.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", 77, "web")
    np.testing.assert_array_equal(again.encode(texts)[0], ids)
    assert not again.names_special("Two dogs!")
    assert [again.decode(row) for row in ids[[1, 2, -1]]] == ["two dogs !", "!! a ! b", "wow !!!"]
    assert_same_elsewhere(again, tmp_path / "out", ids, texts)
    padded = Tokenizer.load(tmp_path / "tokenizer.json", 77, "web", pad_id=49407)
    assert padded.encode([""])[0].tolist() == [[49406, *[49407] * 76]]


def test_vocabulary_and_merges_are_clips(clip, tmp_path):
    from transformers import CLIPTokenizer

    data = json.loads(clip.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(data["vocab"]))
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in data["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ids = theirs(HARD, padding="max_length", truncation=True, max_length=32)["input_ids"]
    assert cleaning(tmp_path) == "none"
    np.testing.assert_array_equal(from_folder(tmp_path, 32).encode(HARD)[0], ids)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    np.testing.assert_array_equal(from_folder(tmp_path, 32).encode(HARD)[0], ids)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ConfigError, match=r"its vocab.json is not CLIP's; add a tokenizer.json"):
        from_folder(tmp_path, 32)


def test_stripped_end_tokens(tmp_path):
    """CLIPA's texts end in padding: open_clip's `strip_sep_token`."""
    import open_clip

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "photo", "of", "the", ".", "##s"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=6, strip_sep_token=True)
    ours, texts = without_end(from_folder(tmp_path, 6, "web")), ["a photo of cats", "A cat.", "", "a a a a a a a"]
    np.testing.assert_array_equal(ours.encode(texts)[0], theirs(texts).numpy())
    ours.save(tmp_path / "run.json")
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "run.json", 6).encode(texts)[0], theirs(texts).numpy())


# A SentencePiece model is a message of protobuf: written here by hand, for tests without the library.
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED = range(1, 6)
PIECES = [("<pad>", 0, CONTROL), ("</s>", 0, CONTROL), ("<unk>", 0, UNKNOWN), ("\u2581", -3, NORMAL), ("\u2581cat", -4, NORMAL)]
PIECES += [("c", -6, NORMAL), ("a", -5, NORMAL), ("t", -5.5, NORMAL), ("at", -7, NORMAL), ("\u2581ca", -9, NORMAL)]
TRAINER = {40: 2, 42: 1, 43: 0}  # ids: unknown, end, padding


def varint(value):
    value, out = value % (1 << 64), b""
    while value > 0x7F:
        value, out = value >> 7, out + bytes([value & 0x7F | 0x80])
    return out + bytes([value])


def message(fields):
    """`fields`: (number, integer, float or bytes)."""

    def one(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    return b"".join(itertools.starmap(one, fields))


def model_file(path, pieces=PIECES, trainer=TRAINER, normalizer=()):
    entries = [(1, message([(1, text.encode()), (2, float(score)), (3, kind)])) for text, score, kind in pieces]
    path.write_bytes(message([*entries, (2, message(trainer.items())), (3, message(normalizer))]))
    return path


def test_a_model_without_the_library(tmp_path):
    """The ids are sentencepiece 0.2.3's for the same file."""
    ours = from_file(model_file(tmp_path / "spiece.model"), 8)
    texts = ["cat", " cat  cat", "tac", "ca dog t", "", "cat" * 9]
    expected = [[4], [4, 4], [3, 7, 6, 5], [9, 3, 2, 3, 7], [], [4, 5, 8, 5, 8, 5, 8]]
    assert ours.encode(texts)[0].tolist() == [[*ids, *[1] * (8 - len(ids))] for ids in expected]
    joined = dict(pieces=[*PIECES, ("ca", -2, NORMAL)], trainer=TRAINER | {3: 2}, normalizer=[(3, 0), (4, 0)])
    bpe = from_file(model_file(tmp_path / "tokenizer.model", **joined), 8)
    assert bpe.encode(["cat  cat", "\u2581cat"])[0].tolist() == [[10, 7, 3, 4, 1, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0, 0]]


def test_sentinels_have_no_embedding(tmp_path):
    """mT5's model has a hundred at its end; SigLIP's text tower has no rows for them."""
    sentinels = [(f"\u2581<extra_id_{i}>", 0, DEFINED) for i in (1, 0)]
    file = model_file(tmp_path / "spiece.model", [*PIECES, *sentinels])
    words = from_file(file, 8)
    assert words.vocab_size == len(PIECES)
    words.backend.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])  # as in a tokenizer.json of transformers' T5Tokenizer
    words.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json", 8).vocab_size == len(PIECES)


REFUSED = {
    "splits by words": dict(trainer=TRAINER | {3: 3}),
    "does not mark the beginning of a word": dict(trainer=TRAINER | {24: 1}),
    "has pieces that it does not use": dict(pieces=[*PIECES, ("x", 0, UNUSED)]),
    "has no end token": dict(trainer=TRAINER | {42: -1}),
    "symbols of its user": dict(pieces=[*PIECES, ("<x>", 0, DEFINED)], trainer=TRAINER | {3: 2}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_tokenizer_json_cant_hold_is_refused(tmp_path, why):
    file = model_file(tmp_path / "spiece.model", **REFUSED[why])
    with pytest.raises(ConfigError, match=rf"^tokenizer = .*spiece.model': it .*{why}.*name a tokenizer.json"):
        from_file(file, 8)


def test_what_is_no_model_is_refused(tmp_path):
    file = model_file(tmp_path / "spiece.model")
    for data in (file.read_bytes()[:-9], b"\xff" * 9, b"", b"\x0b"):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match="is not a SentencePiece model"):
            from_file(file, 8)
    with pytest.raises(ConfigError, match="there is no such file"):
        from_file(tmp_path / "none.model", 8)
    with pytest.raises(ConfigError, match=r"has no tokenizer: a tokenizer.json, spiece.model or"):
        from_folder(tmp_path / "none", 8)


def test_without_open_clip_its_vocabulary_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"comes with open_clip: `pip install open_clip_torch`, or add a tokenizer.json"):
        clip_bpe(77)
