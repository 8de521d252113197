import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.data.images.resize import fit
from clipjax.evals.choice import ChoiceEvaluation, scores
from clipjax.evals.disrupted import disrupted
from clipjax.evals.named import Picture, located
from clipjax.evals.questions import read_questions
from tests.evals.tiny import SIZE, TOKENIZER, stored

PAIRS = np.eye(2, dtype=bool)


def of(*rows, own=PAIRS):
    """The scores of a question whose pictures have these cosines with its captions."""
    return scores(np.array([rows], np.float32), np.array([own], bool))[:, 0].tolist()


def test_scores_of_two_pictures_and_two_captions():
    assert of([0.9, 0.1], [0.2, 0.8])[:3] == [1, 1, 1]
    assert of([0.9, 0.1], [0.95, 0.99])[:3] == [1, 0, 0]  # the first caption is nearer to the other picture
    assert of([0.5, 0.6], [0.4, 0.9])[:3] == [0, 1, 0]
    assert of([0.1, 0.9], [0.8, 0.2])[:3] == [0, 0, 0]


def test_a_collapsed_model_scores_what_guessing_does():
    assert of([0.3, 0.3], [0.3, 0.3])[:3] == pytest.approx([1 / 4, 1 / 4, 1 / 6])
    text, *rest = of([0, 0, 0, 0, 0], own=[[1, 0, 0, 0, 0]])
    assert text == pytest.approx(1 / 5)
    assert np.isnan(rest).all()  # there is one picture


def test_ties_count_their_chance_over_all_orders():
    rng = np.random.default_rng(0)
    cosines = rng.integers(0, 3, (40, 2, 2)) / 10
    found = scores(cosines.astype(np.float32), np.repeat(PAIRS[None], 40, 0))
    for q, rows in enumerate(cosines):
        wins = []
        for order in itertools.permutations(range(4)):
            (a, b), (c, d) = rows + np.reshape(order, (2, 2)) / 1000
            wins.append((a > b and d > c, a > c and d > b, a > b and d > c and a > c and d > b))
        assert found[:3, q] == pytest.approx(np.mean(wins, 0))


def test_further_captions_of_a_picture_and_captions_of_several_pictures():
    assert of([0.2, 0.5, 0.9], own=[[1, 0, 1]])[0] == 1  # one of its captions is nearest
    text, image, group, jaccard = of([0.2], [0.9], [0.9], own=[[0], [1], [0]])
    assert (image, jaccard) == (0.5, 0.5)
    assert np.isnan([text, group]).all()
    _, image, _, jaccard = of([0.8], [0.7], [0.9], [0.1], own=[[1], [0], [1], [1]])
    assert (image, jaccard) == (1, 2 / 4)  # of the three nearest two are its own


def written(path, content):
    path.write_text("\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content))
    return str(path)


def test_files_of_winoground_sugarcrepe_and_aro(tmp_path):
    pair = dict(id=7, image_0="ex_7_img_0", image_1="ex_7_img_1", caption_0="a b", caption_1="b a", collapsed_tag="Object")
    (question,) = read_questions(written(tmp_path / "examples.jsonl", [pair]))
    assert (question.key, question.kind, question.own, question.captions) == ("7", "Object", ((0,), (1,)), ("a b", "b a"))
    assert question.pictures == (Picture("ex_7_img_0"), Picture("ex_7_img_1"))
    crepe = {key: dict(filename=f"{key}.jpg", caption=f"c{key}", negative_caption="d") for key in "09"}
    first, second = read_questions(written(tmp_path / "swap_obj.json", crepe))
    assert (first.key, second.key, second.captions, second.own) == ("0", "9", ("c9", "d"), ((0,), ()))
    box = dict(bbox_x=1, bbox_y=2, bbox_w=3, bbox_h=4, image_path="5.jpg", true_caption="a", false_caption="b")
    relations = [box | dict(relation_name="behind"), box | dict(relation_name="near")]
    behind, near = read_questions(written(tmp_path / "visual_genome_relation.json", relations))
    assert behind.pictures == (Picture("5.jpg", (1, 2, 3, 4)),)
    assert (behind.kind, near.kind) == ("behind", None)  # ARO leaves symmetric relations out of the mean
    attributes = [box | dict(attributes=["red", "old"])] * 25 + [box | dict(attributes=["wet", "new"])] * 24
    kinds = {q.kind for q in read_questions(written(tmp_path / "visual_genome_attribution.json", attributes))}
    assert kinds == {"red and old", None}  # and pairs of fewer than 25 questions
    instances = [dict(cue=cue, candidates=[*"abcde"], associations=["e", "b"]) for cue in ("Orange", "fox")]
    orange, fox = read_questions(written(tmp_path / "winogavil.jsonl", instances))
    assert (orange.captions, fox.captions) == (("An orange",), ("A fox",))
    assert (orange.own, orange.kind, len(orange.pictures)) == (((1, 4),), "5-6", 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([dict(picture="a")], "picture are the fields of no question known: one of ours has"),
        ([dict(images=["a"], captions=["b"])], "question 0 leaves nothing to choose from"),
        (
            [dict(images=["a"], captions=["b", "c"], owner=[1, 0])],
            r"question 0 has 2 captions, whose pictures can't be \[\[1\], \[0\]\]",
        ),
        ([dict(images=["a"], captions=["b", "c"]), dict(images=["a"])], "question 1 lacks 'captions'"),
        ([1], "must hold objects"),
        ([dict(images=["a", "b"], captions=["c", "d"], owner=[0.0, 1])], r"pictures can't be \[\[0.0\], \[1\]\] of 2"),
        ([dict(filename="a", caption=None, negative_caption="b")], "question 0 has a caption that is no text"),
        ([dict(filename=None, caption="a", negative_caption="b")], "question 0 has None, which must be the name of a picture"),
    ],
)
def test_nonsense_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_questions(written(tmp_path / "q.json", content))


def test_pictures_are_found_by_key_path_or_file_name(tsv):
    source = stored(tsv, [0] * 10)
    keys = ["val/0.png", "val/1.png", "b/2", "c/2", *"456789"]
    same, numbers = located(source, keys, [Picture(x) for x in ("val/1.png", "0.jpg", "b/2", "images/4.png")])
    assert same is source
    assert numbers == [1, 0, 2, 4]
    with pytest.raises(ConfigError, match=r"questions = '2\.jpg': names 2 examples of stored: its keys are val/0\.png"):
        located(source, keys, [Picture("2.jpg")])
    with pytest.raises(ConfigError, match="names no example of stored"):
        located(source, keys, [Picture("3")])
    with pytest.raises(ConfigError, match="names 2 examples of stored"):  # shards may repeat keys
        located(source, [*"0123456788"], [Picture("8")])


def test_parts_of_pictures_are_cut_out(tsv, images):
    source = stored(tsv, [0] * 10)
    box = (2.0, 1.0, 5.0, 4.0)
    parts, numbers = located(source, [f"{i}.png" for i in range(10)], [Picture("1", box), Picture("0"), Picture("1", box)])
    assert (len(parts), numbers) == (2, [0, 1, 0])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(parts.read(0).image))), images[1][1:5, 2:7])
    assert parts.read(1).image == tsv / "0.png"
    assert parts.version != source.version


def test_disrupted_captions():
    captions = [("a", "one two three four five six seven"), ("b", "fox"), ("c", "red fox")]
    found = {question.key: question for _, question in disrupted(captions)}
    assert [place for place, _ in disrupted(captions)] == [0] * 4 + [1] + [2] * 3
    assert found == {question.key: question for _, question in disrupted(captions)}  # the same each time
    assert found.keys() == {
        *(f"a {kind}" for kind in ("shuffle_all_words", "shuffle_within_trigrams", "shuffle_trigrams", "replace_word")),
        "b replace_word",
        *(f"c {kind}" for kind in ("shuffle_all_words", "shuffle_within_trigrams", "replace_word")),
    }
    right = captions[0][1].split()
    for kind in ("shuffle_all_words", "shuffle_within_trigrams", "shuffle_trigrams"):
        caption, copy = found[f"a {kind}"].captions
        assert caption == captions[0][1] != copy
        assert sorted(copy.split()) == sorted(right)
    within = found["a shuffle_within_trigrams"].captions[1].split()
    assert [set(within[i : i + 3]) for i in (0, 3, 6)] == [set(right[i : i + 3]) for i in (0, 3, 6)]
    assert "four five six" in found["a shuffle_trigrams"].captions[1]
    assert found["c shuffle_all_words"].captions == ("red fox", "fox red")
    assert sum(a != b for a, b in zip(found["a replace_word"].captions[1].split(), right, strict=True)) == 1


@pytest.fixture(scope="module")
def questions(tsv):
    """Of the images of the fixture `tsv`: two pairs, of which one has an image that can't be read, and one of a single image."""
    rows = [dict(images=["0.png", "1"], captions=["fox", "hen"]), dict(images=["3", "4"], captions=["owl", "ant"], kind="x")]
    rows.append(dict(images=[["6.png", [0, 0, 4, 4]]], captions=["cow", "cat", "cat"], kind="x"))
    return written(tsv / "own.jsonl", rows)


def test_equals_the_definition_on_every_mesh(tsv, questions, model, params, images, encoder, capsys, caplog):
    wanted = config.Choice(data=f"tsv:{tsv}/pairs.tsv", questions=questions)
    evaluation = ChoiceEvaluation.prepare(encoder, TOKENIZER, Data(spec=wanted.data), wanted)
    assert "3 questions; the captions of the first are 'fox', 'hen'" in capsys.readouterr().err
    assert "in 1 of 3 questions captions have the same tokens" in caplog.text
    results = evaluation.run(params)
    z = np.asarray(model.encode_image(images[[0, 1]]))
    t = np.asarray(model.encode_text(TOKENIZER.encode(["fox", "hen"])[0]))
    (a, b), (c, d) = z @ t.T
    (examples,) = results.examples
    assert examples.keys == ["0", "1", "2"]
    assert examples.groups == ["0.png", "3", "6.png"]
    pair = [float(a > b and d > c), float(a > c and d > b), float(a > b and d > c and a > c and d > b)]
    assert [examples.values[name][0] for name in config.Choice.metrics[:3]] == pair
    assert np.isnan(examples.values["text_score"][1])
    part = np.asarray(model.encode_image(fit(Image.fromarray(images[6][:4, :4]), SIZE, "squash")[None]))[0]
    cow, cat = np.asarray(model.encode_text(TOKENIZER.encode(["cow", "cat"])[0])) @ part
    single = float(cow > cat)  # of the part that is named
    assert examples.values["text_score"][2] == single
    assert results.metrics["text_score"] == np.mean([pair[0], single])
    assert results.metrics["image_score"] == pair[1]
    assert results.metrics["mean_per_kind_text_score"] == results.metrics["text_score_x"] == single
    assert evaluation.dataset == wanted.dataset(Data(spec="emoji")) == f"tsv:{tsv}/pairs.tsv+own"


def test_a_dataset_against_its_own_disrupted_captions(tsv, params, encoder):
    wanted = config.Choice(data=f"tsv:{tsv}/pairs.tsv")
    evaluation = ChoiceEvaluation.prepare(encoder, TOKENIZER, Data(spec=wanted.data), wanted)
    metrics = evaluation.run(params).metrics
    kinds = [name for name in metrics if name.startswith("text_score_")]
    assert kinds == [f"text_score_{kind}" for kind in ("replace_word", "shuffle_all_words", "shuffle_within_trigrams")]
    assert metrics["mean_per_kind_text_score"] == pytest.approx(np.mean([metrics[kind] for kind in kinds]))
    assert (metrics["image_score"], metrics["group_score"]) == (None, None)
