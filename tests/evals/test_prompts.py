import hashlib

import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.evals import zeroshot
from clipjax.evals.encoder import Encoder
from clipjax.evals.prompts import classnames, fill, templates
from tests.evals.tiny import MODEL, TOKENIZER, mesh_of, stored


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        # sha256 of the templates joined by newlines, as read from open_clip's zero_shot_metadata.py at 89fb801.
        ("imagenet", 80, "c078f4d4ced9e360a3050ace0c5abd7bed09693bceb3ed0c7a39aba61a668c5c"),
        ("simple", 7, "dbce9f3c8c8dc3ece8008992bcb0aaa3d2dd45219debd3b24658e28ea1240b16"),
    ],
)
def test_the_published_templates(name, count, digest):
    found = templates(name)
    assert len(found) == len(set(found)) == count
    assert hashlib.sha256("\n".join(found).encode()).hexdigest() == digest
    assert set(found) <= set(templates("imagenet"))


def test_the_field_s_sets_have_templates():
    assert templates("imagenet1k") == templates("imagenet")
    assert templates("eurosat")[1] == "a centered satellite photo of a {c}."
    assert templates("mnist") == ('a photo of the number: "{c}".',)


def test_plain_is_the_name_alone():
    assert [fill(t, "red {fox}") for t in templates("plain")] == ["red {fox}"]


def test_a_file_of_templates(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a photo of {c}, a {kind} of animal. \n{c}\n\n", encoding="utf-8")
    assert [fill(t, "fox") for t in templates(str(file))] == ["a photo of fox, a {kind} of animal.", "fox"]


def test_a_template_without_place_for_the_name_is_named(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a photo of {c}\na photo\n")
    with pytest.raises(ConfigError, match=r"t\.txt': line 2, 'a photo', lacks \{c\}: write it where"):
        templates(str(file))


@pytest.mark.parametrize(("read", "field"), [(templates, "templates"), (classnames, "classnames")])
def test_files_that_hold_nothing(tmp_path, read, field):
    with pytest.raises(ConfigError, match=rf"{field} = .*nowhere': No such file.*: use "):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read(str(tmp_path))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"empty'.*the file is empty"):
        read(str(tmp_path / "empty"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(str(tmp_path / "binary"))


def test_classnames(tmp_path):
    file = tmp_path / "names"
    file.write_text("\ufeffred fox\r\npiñata\n", encoding="utf-8")
    assert classnames(str(file)) == ("red fox", "piñata")
    file.write_text("red fox\n\nwolf\n")
    with pytest.raises(ConfigError, match="line 2 is empty"):
        classnames(str(file))


def test_what_a_model_is_asked_is_told(tsv, monkeypatch, capsys, caplog):
    source = stored(tsv, [i % 3 for i in range(10)], captions=False)
    source.classnames, source.templates = ("fox", "hen", "fox"), ("the {c}", "many {c}")
    monkeypatch.setattr(zeroshot, "open_source", lambda data: source)
    encoder, data = Encoder(MODEL, mesh_of("1"), 6), config.Data(spec="emoji")

    def tokens(**fields):
        evaluation = zeroshot.ZeroshotEvaluation.prepare(encoder, TOKENIZER, data, config.Zeroshot(**fields))
        return [TOKENIZER.decode(row) for row in next(iter(evaluation.prompts))["text"]]

    own = ["the fox", "many fox", "the hen", "many hen", "the fox", "many fox"]
    assert tokens() == own
    assert "stored: 3 classes, named by stored, in 2 templates; the first prompt is 'the fox'" in capsys.readouterr().err
    assert "stored: the first prompts of 2 of 3 classes have the same tokens as another's: fox (0) = fox (2)" in caplog.text
    assert tokens(templates="plain")[:3] == ["fox", "hen", "fox"]
    source.templates = None
    assert tokens()[0] == "itap of a fox."
