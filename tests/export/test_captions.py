"""The same ids for captions of the web, in clipjax and in the libraries that load an exported folder."""

import numpy as np
import pytest

from clipjax.data.clean import clean
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.captions import MOST, agreement
from clipjax.export.compare.verify import verify
from clipjax.export.folder import export
from tests import torch_reference
from tests.export.models import CAPTIONS, TEXT, WORDS, clip, parameters
from tests.web import RARE, WEB

torch_reference.load()

WHOLE = [clean(text, "none") for text in WEB]  # other tokenizers fail at half surrogates


@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    """A tokenizer that does not change to lower case by itself."""
    path = tmp_path_factory.mktemp("cased") / "tokenizer.json"
    Tokenizer.train(WORDS.split() * 3 + WEB, TEXT["vocab_size"], False, 64).save(path)
    return path


def ids_of(folder, to):
    """The function from strings to ids that a user of the library calls."""
    if to == "open_clip":
        import open_clip

        return open_clip.get_tokenizer(f"local-dir:{folder}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(list(texts), padding="max_length", truncation=True)["input_ids"]


@pytest.mark.parametrize("how", ["none", "web", "canonicalize"])
@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_equal_ids(tmp_path, cased, to, how):
    model = clip(text=dict(length=64))
    export(model, parameters(model), cased, "squash", tmp_path / "out", to, how)
    words, ids = Tokenizer.load(cased, 64, how), ids_of(tmp_path / "out", to)
    assert len(WHOLE) > 150
    given = [ids.clean_fn(text) for text in WHOLE] if (to, how) == ("open_clip", "none") else WHOLE  # it can't but clean
    same = (np.asarray(ids(WHOLE)) == words.encode(given)[0]).all(axis=1)
    assert not [text for text, equal in zip(WHOLE, same, strict=True) if not equal]
    if how != "none":  # open_clip resolves every entity itself
        same = (np.asarray(ids(RARE)) == words.encode(RARE)[0]).all(axis=1)
        assert same.all() if to == "open_clip" else not same.any()


def test_agreement_is_counted(tmp_path, cased):
    model = clip(text=dict(length=64))
    export(model, parameters(model), cased, "squash", tmp_path / "out", "transformers", "web")
    words, ids = Tokenizer.load(cased, 64, "web"), ids_of(tmp_path / "out", "transformers")
    found = agreement(ids, words, [*WEB, *RARE, "red <|endoftext|> &checkmark;"])
    assert (found.captions, found.same) == (len(WEB) + len(RARE) + 1, len(WEB))
    special = [text for text in WEB if words.names_special(text)]
    assert (found.special, found.special_same) == (len(special) + 1, len(special))
    assert found.other == RARE[0]
    assert found.figure.startswith(f"captions with equal ids: {len(WEB)} of {found.captions} (")
    assert found.notes[0].startswith(f"captions with the string of a special token: {len(special) + 1}, of which {len(special)} ")
    assert agreement(ids, words, (f"number {i}" for i in range(MOST + 10))).captions == MOST
    assert agreement(ids, words, []) is None


def test_verify_counts_captions_and_judges_what_is_no_known_difference(tmp_path, tokenizer, images):
    model, out = clip(), tmp_path / "out"
    params = parameters(model)
    export(model, params, tokenizer, "squash", out, "transformers", "web")
    texts = [CAPTIONS[0], "man &amp; woman", "&checkmark; flag", "red <|endoftext|> heart", "&#8217;"]
    report = verify(out, "transformers", model, params, tokenizer, "squash", images, texts, "web", texts)
    assert report.failures == []
    assert (report.captions.same, report.captions.special) == (4, 1)
    assert any(line.startswith("captions with equal ids: 4 of 5 (80.00%); not '&checkmark; flag'") for line in report.figures)
    assert any("string of a special token: 1, of which 1 get equal ids" in note for note in report.notes)
    wrong = verify(
        out, "transformers", model, params, tokenizer, "squash", images, texts, "none"
    )  # as if it had not been cleaned
    assert [failure.split()[0] for failure in wrong.failures] == ["string"]
    assert wrong.captions is None
