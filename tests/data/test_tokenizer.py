import hashlib
import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from clipjax.config import ConfigError
from clipjax.data.tokenizer import Tokenizer

CORPUS = ["red apple", "green apple", "red car", "a red, red rose", "naïve café"] * 3


def train(vocab_size=280, lowercase=True, length=12):
    return Tokenizer.train(CORPUS, vocab_size, lowercase, length)


def test_special_ids():
    tokenizer = train()
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 1, tokenizer.vocab_size - 1)
    assert tokenizer.vocab_size == 280


def test_pinned_ids():
    """Every exported model holds them: no change of a library or of the code may change them unnoticed."""
    ids, truncated = train().encode(["red apple", "Green  apples"])
    assert ids.tolist() == [
        [1, 260, 267, 279, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 277, 269, 267, 84, 279, 0, 0, 0, 0, 0, 0],
    ]
    assert ids.dtype == np.int32
    assert not truncated.any()


def test_pinned_tokenizer():
    """Without cleaning, a run's captions give the tokenizer that every version has made of them."""
    captions = [f"{text} \u201cquoted\u201d it\u2019s  Caf\u00e9 &amp; {i}" for i, text in enumerate(CORPUS)]
    made = Tokenizer.train(captions, 300, True, 12)
    vocabulary = json.dumps(sorted(made.backend.get_vocab().items())).encode()
    assert hashlib.sha256(vocabulary).hexdigest()[:16] == "8d9e3b9df76e0b25"
    assert made.encode(["&amp; \u201cRED\u201d  cafe\u0301"])[0].tolist() == [[1, 270, 273, 28, 269, 83, 258, 3, 263, 299, 0, 0]]


def test_same_captions_give_same_tokens():
    assert train().backend.to_str() == train().backend.to_str()


def test_word_has_the_same_tokens_anywhere():
    ids, _ = train().encode(["red", "red red"])
    first, second = ids[0][1:2], ids[1][1:3]
    assert second.tolist() == [*first, *first]


def test_normalisation():
    tokenizer = train()
    composed, decomposed, spaced = tokenizer.encode(["CAFÉ au lait", "cafe\u0301 AU lait", "  café \n au\tlait "])[0]
    np.testing.assert_array_equal(composed, decomposed)
    np.testing.assert_array_equal(composed, spaced)
    upper, lower = train(lowercase=False).encode(["RED", "red"])[0]
    assert upper.tolist() != lower.tolist()


def test_decode_inverts_encode():
    tokenizer = train(length=40)
    for text in ["a red rose", "日本 🚀 emoji", "x < y: 3.5%", ""]:
        assert tokenizer.decode(tokenizer.encode([text])[0][0]) == text


def test_truncation_keeps_the_end_and_is_counted():
    tokenizer = train(length=5)
    fits, exact, long = "red", "red apple red", "red apple red car red"
    ids, truncated = tokenizer.encode([fits, exact, long])
    assert truncated.tolist() == [False, False, True]
    assert [tokenizer.tokens(t) for t in (fits, exact)] == [3, 5]
    assert tokenizer.tokens(long) > 5
    assert ids[2, 0] == tokenizer.start_id
    assert ids[2, -1] == ids[1, -1] == tokenizer.end_id
    assert tokenizer.decode(ids[2]) == "red apple red"


def test_save_and_load(tmp_path):
    trained = train()
    trained.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path / "tokenizer.json", 12)
    texts = ["Red apple", "日本", "a red, red rose", "naïve"]
    np.testing.assert_array_equal(loaded.encode(texts)[0], trained.encode(texts)[0])
    assert (loaded.pad_id, loaded.start_id, loaded.end_id, loaded.vocab_size) == (0, 1, 279, 280)


def test_agrees_with_the_library_alone(tmp_path):
    """transformers and open_clip truncate and pad with the library's own functions."""
    trained = train(length=7)
    trained.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.padding["pad_token"] == "<pad>"
    library.enable_truncation(7)
    library.enable_padding(length=7, pad_id=library.padding["pad_id"], pad_token=library.padding["pad_token"])
    texts = ["red", "red apple green apple red car", "  café", ""]
    expected = [e.ids for e in library.encode_batch(texts)]
    assert trained.encode(texts)[0].tolist() == expected


def t5_style(special: list[str]) -> tokenizers.Tokenizer:
    """A SentencePiece unigram model as transformers exports it: nothing but `</s>` at the end."""
    pieces = [*special, "▁red", "▁apple", "▁", "e", "d", "a", "p", "l", "r"]
    backend = tokenizers.Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=pieces.index("<unk>")))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken(s, special=True) for s in special])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", pieces.index("</s>"))])
    return backend


def test_siglip_style_end_is_also_padding(tmp_path):
    t5_style(["</s>", "<unk>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (None, 0, 0)
    ids, truncated = tokenizer.encode(["Red apple", "red red red red"])
    assert ids.tolist() == [[2, 3, 0, 0], [2, 2, 2, 0]]
    assert truncated.tolist() == [False, True]


def test_padding_comes_from_a_token_named_so(tmp_path):
    t5_style(["<pad>", "</s>", "<unk>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    assert (tokenizer.end_id, tokenizer.pad_id) == (1, 0)


@pytest.mark.parametrize("pad_token", ["</s>", {"content": "</s>", "lstrip": False}])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_padding_comes_from_the_files_beside_it(tmp_path, name, pad_token):
    """SigLIP's vocabulary has a `<pad>`, but the model was trained with `</s>` in its place; the run's copy remembers it."""
    t5_style(["<pad>", "</s>", "<unk>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps({"pad_token": pad_token}))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    assert (tokenizer.end_id, tokenizer.pad_id) == (1, 1)
    copy = tmp_path / "run"
    copy.mkdir()
    tokenizer.save(copy / "tokenizer.json")
    assert Tokenizer.load(copy / "tokenizer.json", 6).pad_id == 1


def test_clip_style_post_processor(tmp_path):
    """OpenAI's tokenizer.json marks start and end with RobertaProcessing and names no padding."""
    backend = tokenizers.Tokenizer(models.BPE({"a</w>": 0, "<s>": 1, "<e>": 2}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("<e>", 2), ("<s>", 1), trim_offsets=False, add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    assert tokenizer.encode(["a", "a a a"])[0].tolist() == [[1, 0, 2, 2], [1, 0, 0, 2]]


SPECIAL = ["red <|endoftext|> apple", "<|startoftext|>red", "<pad> red", "red<pad>", "x <|endoftext|><|endoftext|>"]


def test_strings_of_special_tokens_are_text():
    """Else a caption would end there: the text tower looks for the first end token."""
    tokenizer = train(length=40)
    ids, _ = tokenizer.encode(SPECIAL)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer)).encode(SPECIAL)[0], ids)  # as worker processes get it
    for row, text in zip(ids.tolist(), SPECIAL, strict=True):
        assert row.count(tokenizer.end_id) == 1
        assert row.count(tokenizer.start_id) == 1
        body = row[: row.index(tokenizer.end_id)]
        assert tokenizer.pad_id not in body
        assert tokenizer.tokens(text) == len(body) + 1
        assert tokenizer.decode(row) == text
        assert tokenizer.names_special(text)
    assert not tokenizer.names_special("red < pad > <|end|>")


@pytest.mark.parametrize("special", [["</s>", "<unk>"], ["<pad>", "</s>", "<unk>"]])
def test_also_where_the_model_itself_has_them(tmp_path, special):
    """A unigram model finds `</s>` among its own pieces. In SentencePiece it is a control symbol, which no text has."""
    t5_style(special).save(str(tmp_path / "tokenizer.json"))
    for _ in range(2):  # also what the first has saved
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 12)
        plain, cut, padded = tokenizer.encode(["red apple", "red </s> apple", "red <pad> apple"])[0].tolist()
        assert plain[:3] == [tokenizer.backend.token_to_id("▁red"), tokenizer.backend.token_to_id("▁apple"), tokenizer.end_id]
        for row in (cut, padded):
            body = row[: row.index(tokenizer.end_id)]
            assert body[-1] == plain[1]
            assert tokenizer.pad_id not in body
        tokenizer.save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "Sequence"
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]) == 2


def test_also_where_a_file_does_not_mark_them_as_special(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<": 2, ">": 3, "p": 4, "e": 5}, []))
    backend.add_tokens([AddedToken("<p>", normalized=True), AddedToken("<e>", normalized=False), AddedToken("<b>")])
    backend.post_processor = processors.TemplateProcessing(single="$A <e>", special_tokens=[("<e>", 7)])
    backend.enable_padding(pad_id=6, pad_token="<p>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 9)
    assert tokenizer.encode(["a<p>b", "a<e>b"])[0].tolist() == [[0, 2, 4, 3, 1, 7, 6, 6, 6], [0, 2, 5, 3, 1, 7, 6, 6, 6]]
    assert tokenizer.encode(["a<b>"])[0].tolist() == [[0, 8, 7, *[6] * 6]]  # a word that was added to the vocabulary stays one


def test_half_surrogates_are_no_reason_to_stop(tmp_path):
    """JSON may hold one, and the library takes none."""
    tokenizer = Tokenizer.train([*CORPUS, "\ud83d", "\ud83d\ude00"], 300, True, 12)
    lone, pair, whole = tokenizer.encode(["red \ud83d", "\ud83d\ude00", "\U0001f600"])[0]
    assert lone.tolist() == tokenizer.encode(["red \ufffd"])[0][0].tolist()
    assert pair.tolist() == whole.tolist()
    assert tokenizer.tokens("\ud83d") > 2


def test_cleaning_comes_first(tmp_path):
    messy = ["red&nbsp;apple", "\ufeffRED &amp; green", "it&#8217;s a\x00 rose"]
    clean = ["red apple", "red & green", "it's a rose"]
    tokenizer = Tokenizer.train([*CORPUS, *messy], 290, True, 12, "web")
    same = Tokenizer.train([*CORPUS, *clean], 290, True, 12)
    assert tokenizer.backend.to_str() == same.backend.to_str()  # the cleaning stands in the configuration
    assert tokenizer.encode(messy)[0].tolist() == same.encode(clean)[0].tolist() != same.encode(messy)[0].tolist()
    assert [tokenizer.tokens(text) for text in messy] == [same.tokens(text) for text in clean]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json", 12, "web").encode(messy)[0].tolist() == same.encode(clean)[0].tolist()


@pytest.mark.parametrize("own", [normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), normalizers.NFC(), None])
def test_a_standalone_tokenizer_cleans_truncates_and_pads(tmp_path, own):
    bare = train(length=7)
    if own is not None:
        bare.backend.normalizer = own
    bare.save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 7, "canonicalize")
    tokenizer.standalone().save(str(tmp_path / "alone.json"))
    texts = ["Red&nbsp;apple.", "red apple green apple red car", "\ufeff", "CAF&Eacute;!"]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "alone.json"))
    expected = tokenizer.encode(texts)[0].tolist()
    assert [e.ids for e in library.encode_batch(texts)] == expected
    again = Tokenizer.load(tmp_path / "alone.json", 7, "canonicalize")  # without cleaning twice
    assert again.encode(texts)[0].tolist() == expected
    assert len(again.backend.to_str()) < 20_000 < len(library.to_str())
    again.standalone().save(str(tmp_path / "twice.json"))
    assert (tmp_path / "twice.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert Tokenizer.load(tmp_path / "alone.json", 7).encode(texts)[0].tolist() == expected


def test_vocabulary_too_small():
    with pytest.raises(ConfigError, match=r"model.text.vocab_size = 258: a byte-level BPE needs at least 259"):
        train(vocab_size=258)


def test_length_without_room():
    with pytest.raises(ConfigError, match=r"model.text.length = 2: leaves no room"):
        train(length=2)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.path = '.*none.json': there is no such file"):
        Tokenizer.load(tmp_path / "none.json", 8)


def test_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer.json of Hugging Face tokenizers"):
        Tokenizer.load(tmp_path / "tokenizer.json", 8)


def test_cut_at_the_beginning(tmp_path):
    train().save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    with pytest.raises(ConfigError, match=r"tokenizer.json': cuts long texts at their beginning"):
        Tokenizer.load(tmp_path / "tokenizer.json", 8)


def test_a_template_without_marks(tmp_path):
    """It says that nothing marks the end of a text, as transformers' tokenizer of SigLIP 2 does: padding follows the text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    backend.enable_padding(direction="left", pad_id=0, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    ids, truncated = tokenizer.encode(["b", "b b b b b", ""])
    assert ids.tolist() == [[0, 0, 0, 2], [2, 2, 2, 2], [0, 0, 0, 0]]
    assert truncated.tolist() == [False, True, False]
    assert [tokenizer.decode(row) for row in ids] == ["b", "b b b b", ""]
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.tokens("a b")) == (None, 0, 2)


def test_no_end(tmp_path):
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer.json'.*nothing marks the end of a text: give it a post-processor"):
        Tokenizer.load(tmp_path / "tokenizer.json", 8)
