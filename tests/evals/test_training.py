import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import embed as embedding
from clipjax.evals import retrieval, zeroshot
from clipjax.evals.embed import embed, write_npz
from clipjax.evals.encoder import Encoder
from clipjax.evals.report import report, write_json
from clipjax.evals.retrieval import RetrievalEvaluation
from clipjax.evals.table import EVALUATIONS, class_of
from clipjax.evals.training import make_evaluators, prepare
from clipjax.evals.zeroshot import ZeroshotEvaluation
from tests.evals.tiny import MODEL, TOKENIZER, WORDS, mesh_of, standing, stored, tokenize

READABLE = [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def run(tsv):
    spec = f"tsv:{tsv}/pairs.tsv"
    return config.Run(
        model=MODEL,
        data=Data(spec=spec, workers=1),
        train=config.Train(steps=5000, eval_batch_size=4),
        evals=(
            config.Retrieval(data=spec, every=100),
            config.Zeroshot(data=spec, every=250, templates="plain", classnames=str(tsv / "names.txt")),
        ),
    )


def plain(classnames):
    return config.Zeroshot(templates="plain", classnames=classnames)


def dense_hits(queries, keys, own):
    return [np.mean(standing(np.float64(queries) @ np.float64(keys).T, own).hits(k)) for k in (1, 5, 10)]


@pytest.mark.parametrize("mesh", ["1", "8"])
def test_evaluators_equal_the_dense_reference(run, model, params, images, mesh):
    retrieval, zeroshot = make_evaluators(run, mesh_of(mesh), TOKENIZER)
    z = np.asarray(model.encode_image(jnp.asarray(images[READABLE])))
    captions = [(i, w) for i, w in enumerate([*WORDS[:9], WORDS[0]])] + [(2, f"a photo of the {WORDS[2]}")]
    owner = np.array([i for i, _ in captions])
    text = np.asarray(model.encode_text(jnp.asarray(tokenize([w for _, w in captions]))))
    own = np.array(READABLE)[:, None] == owner[None, :]
    answered = owner != 4  # the image that can't be read can't be found, but its caption is among the keys
    to_image, to_text = dense_hits(text[answered], z, own.T[answered]), dense_hits(z, text, own)
    want = {f"image_retrieval_recall@{k}": v for k, v in zip((1, 5, 10), to_image, strict=True)}
    want |= {f"text_retrieval_recall@{k}": v for k, v in zip((1, 5, 10), to_text, strict=True)}
    found = retrieval.run(params, 100)
    assert {name: found[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert {*want, "pair_auc"} == set(config.Retrieval.metrics)

    classes = np.asarray(model.encode_text(jnp.asarray(tokenize(WORDS))))
    labels = np.array([i % 9 for i in READABLE])
    top1, top5, _ = dense_hits(z, classes, labels[:, None] == np.arange(11)[None, :])
    found = zeroshot.run(params, 100)
    assert found["acc1"] == pytest.approx(top1, abs=1e-12)
    assert found["acc5"] == pytest.approx(top5, abs=1e-12)
    assert found == zeroshot.run(params, 200)  # the second time from memory
    assert found.keys() == set(config.Zeroshot.metrics[:4])  # the others are of other datasets


def test_every_evaluation_of_clipjax_has_its_class():
    own = {member.config for member in config.TrainingEvaluation.members.values() if member.source is None}
    assert EVALUATIONS.keys() == own
    fewer = {c: evaluation for c, evaluation in EVALUATIONS.items() if c is not config.Geometry}
    with pytest.raises(TypeError, match="classes of TrainingEvaluation that nothing is bound to: Geometry"):
        config.TrainingEvaluation.bind(fewer)


def test_cadence_and_names(run, tsv):
    retrieval, zeroshot = make_evaluators(run, mesh_of("1"), TOKENIZER)
    assert (retrieval.task, zeroshot.task) == ("zeroshot_retrieval", "zeroshot_classification")
    assert retrieval.dataset == zeroshot.dataset == f"tsv:{tsv}/pairs.tsv"
    assert [s for s in range(1, 501) if zeroshot.due(s)] == [250, 500]
    assert [s for s in range(1, 501) if retrieval.due(s)] == [100, 200, 300, 400, 500]


def test_in_training_no_metric_is_none(run, params, tsv):
    (tsv / "four.tsv").write_text(f"filepath\ttitle\n0.png\t{WORDS[0]}\n2.png\t{WORDS[2]}\n")
    (tsv / "four.txt").write_text("\n".join(WORDS[:4]) + "\n")
    encoder = Encoder(MODEL, mesh_of("1"), 4)
    data, names = Data(spec=f"tsv:{tsv}/four.tsv", workers=1), str(tsv / "four.txt")
    assert ZeroshotEvaluation.prepare(encoder, TOKENIZER, data, plain(names)).run(params).metrics["acc5"] is None
    evals = (config.Zeroshot(data=data.spec, templates="plain", classnames=names),)
    (evaluator,) = make_evaluators(config.Run(model=MODEL, data=data, evals=evals), mesh_of("1"), TOKENIZER)
    assert evaluator.run(params, 100).keys() == {"acc1", "mean_per_class_recall", "macro_f1"}


def test_geometry_in_training_has_metrics_and_a_plot_a_step(run, params, tmp_path):
    evals = (config.Geometry(data=run.data.spec, every=10),)
    (evaluator,) = make_evaluators(dataclasses.replace(run, evals=evals), mesh_of("1"), TOKENIZER, tmp_path)
    assert evaluator.task == "geometry"
    found = evaluator.run(params, 20)
    evaluator.run(params, 5000)
    every_metric = evaluator.evaluation.run(params).metrics
    assert found == {name: value for name, value in every_metric.items() if not isinstance(value, list | None)}
    assert every_metric.keys() - found.keys() == {"bias", "explained_variance_image", "explained_variance_text"}
    assert set(config.Geometry.metrics) <= found.keys()
    names = sorted(p.name for p in (tmp_path / "geometry").iterdir())
    assert [name[-20:] for name in names] == ["pairs.tsv-000020.png", "pairs.tsv-005000.png"]
    (silent,) = make_evaluators(dataclasses.replace(run, evals=evals), mesh_of("1"), TOKENIZER)
    assert silent.run(params, 30) == found
    assert len(list((tmp_path / "geometry").iterdir())) == 2


def test_what_can_not_be_read_is_refused_before_training(run):
    for evals, match in (
        (config.Zeroshot(data=run.data.spec), "has none of its own: give a set's name or a file"),
        (config.Zeroshot(data=run.data.spec, classnames="nowhere"), "classnames = 'nowhere'"),
        (config.Zeroshot(data=run.data.spec, templates="fancy", classnames=run.evals[1].classnames), "templates = 'fancy'"),
        (config.Retrieval(data="tsv:nowhere"), "nowhere"),
        (config.Geometry(data="tsv:nowhere"), "nowhere"),
        (config.Retrieval(split="tset"), r"^evals\.0, zeroshot_retrieval: data\.split = 'tset': emoji has "),
    ):
        with pytest.raises(ConfigError, match=match):
            make_evaluators(config.Run(data=config.Data(spec="emoji"), model=MODEL, evals=(evals,)), mesh_of("1"), TOKENIZER)


def test_an_evaluation_without_data_sees_the_run_s_own():
    own = Data(spec="emoji", text_field="captions", workers=1)
    evals = (config.Retrieval(), config.Retrieval(data="emoji", split="train"))
    best = "zeroshot_retrieval/emoji/test/image_retrieval_recall@1"
    run = config.Run(data=own, model=MODEL, evals=evals, train=config.Train(best=best))
    one, other = make_evaluators(run, mesh_of("1"), TOKENIZER)
    assert (one.dataset, other.dataset) == ("emoji/test", "emoji/train")
    with pytest.raises(ConfigError, match=r"^evals\.1\.data = None: the run's own tsv:a\.tsv has no splits"):
        dataclasses.replace(run, data=Data(spec="tsv:a.tsv"), evals=(config.Retrieval(data="tsv:b.tsv"), config.Retrieval()))


def test_an_evaluation_does_not_see_what_the_run_trains_on(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    run = config.Run(data=Data(spec=f"folder:{tmp_path}"), model=MODEL, evals=(config.Retrieval(),))
    match = (
        r"^evals\.0, zeroshot_retrieval: data = 'folder:.*': the names of its files tell no splits, so these are the examples it"
    )
    with pytest.raises(ConfigError, match=match):
        make_evaluators(run, mesh_of("1"), TOKENIZER)
    named = dataclasses.replace(run, evals=(config.Retrieval(data=f"folder:{tmp_path}"),))
    assert make_evaluators(named, mesh_of("1"), TOKENIZER)[0].dataset == f"folder:{tmp_path}/test"


def test_embed_writes_what_the_towers_say(run, model, params, images, tmp_path):
    found = embed(Encoder(MODEL, mesh_of("8"), 4), params, TOKENIZER, run.data)
    file = tmp_path / "new" / "z.bin"
    write_npz(file, found)
    assert [p.name for p in file.parent.iterdir()] == ["z.bin"]
    with np.load(file) as stored:
        assert stored["key"].tolist() == [f"{i}.png" for i in READABLE]
        assert stored["image"].dtype == stored["text"].dtype == np.float32
        np.testing.assert_allclose(stored["image"], model.encode_image(jnp.asarray(images[READABLE])), atol=1e-6)
        main = tokenize([WORDS[i % 9] for i in READABLE])
        np.testing.assert_allclose(stored["text"], model.encode_text(jnp.asarray(main)), atol=1e-6)


def test_images_alone_are_embedded_and_compared_with_no_caption(run, tsv, model, params, images, monkeypatch):
    encoder, alone = Encoder(MODEL, mesh_of("1"), 4), stored(tsv, [i % 3 for i in range(10)], captions=False)
    for module in (embedding, retrieval, zeroshot):
        monkeypatch.setattr(module, "open_source", lambda data: alone)
    found = embed(encoder, params, TOKENIZER, run.data)
    assert found.keys() == {"image", "key"}
    assert found["key"].tolist() == [f"{i}.png" for i in READABLE]
    np.testing.assert_allclose(found["image"], model.encode_image(jnp.asarray(images[READABLE])), atol=1e-6)
    for wanted in (config.Retrieval(), config.Geometry()):
        with pytest.raises(ConfigError, match=r"it has images alone, and .* needs captions: name their field"):
            class_of(wanted).prepare(encoder, TOKENIZER, run.data, wanted)
    alone.classnames = ("fox", "hen", "owl")
    results = ZeroshotEvaluation.prepare(encoder, TOKENIZER, run.data, plain(None)).run(params)
    found = model.encode_image(jnp.asarray(images[READABLE])) @ model.encode_text(jnp.asarray(tokenize(alone.classnames))).T
    assert results.metrics["acc1"] == np.mean(found.argmax(1) == np.array(READABLE) % 3)


def test_labels_come_from_a_field(run, tsv, model, params, images):
    """A csv without captions: numbers that a file names, and names of the dataset's own."""
    encoder = Encoder(MODEL, mesh_of("1"), 4)
    rows = [f"{i}.png,{i % 3},{('hen', 'fox', 'owl')[i % 3]}" for i in range(10)]
    (tsv / "labels.csv").write_text("\n".join(["file,number,name", *rows]) + "\n")
    (tsv / "three.txt").write_text("hen\nfox\nowl\n")
    z, prompts = model.encode_image(jnp.asarray(images[READABLE])), jnp.asarray(tokenize(["hen", "fox", "owl"]))
    right = np.mean((z @ model.encode_text(prompts).T).argmax(1) == np.array(READABLE) % 3)
    for field, file in (("number", str(tsv / "three.txt")), ("name", None)):
        fields = dict(data=f"csv:{tsv}/labels.csv", image_field="file", label_field=field)
        wanted = dataclasses.replace(plain(file), **fields)
        assert prepare(wanted, encoder, TOKENIZER, run.data).run(params).metrics["acc1"] == right
    with pytest.raises(ConfigError, match=r"classnames = None: csv:.* has none of its own"):
        prepare(dataclasses.replace(plain(None), **fields | {"label_field": "number"}), encoder, TOKENIZER, run.data)


def test_an_evaluation_cleans_as_it_is_told(run):
    encoder, web = Encoder(MODEL, mesh_of("1"), 4), dataclasses.replace(run, tokenizer=config.BPE(clean="web"))
    trained = Tokenizer(TOKENIZER.backend, TOKENIZER.pad_id, TOKENIZER.length, "web")
    for wanted, how in ((None, "web"), ("none", "none"), ("canonicalize", "canonicalize")):
        zeroshot = config.Zeroshot(data=run.data.spec, classnames=run.evals[1].classnames, templates="plain", clean=wanted)
        prompts = prepare(zeroshot, encoder, trained, web.data).prompts
        np.testing.assert_array_equal(next(iter(prompts))["text"], TOKENIZER.cleaning(how).encode(WORDS[:4])[0])
    assert trained.clean == "web"


def test_a_source_without_any_caption_is_refused(run, tsv, monkeypatch):
    source = stored(tsv, [-1] * 10, captions=False)
    source.captioned = True
    monkeypatch.setattr(retrieval, "open_source", lambda data: source)
    with pytest.raises(ConfigError, match=r"'stored': none of its 10 examples has a caption"):
        RetrievalEvaluation.prepare(Encoder(MODEL, mesh_of("1"), 4), TOKENIZER, run.data, config.Retrieval())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "z.npz"
    write_npz(file, {"a": np.ones(3)})

    def full(file, **_):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_npz(file, {"a": np.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["z.npz"]
    assert np.load(file)["a"].tolist() == [1, 1, 1]


def test_the_report_has_the_shape_of_clip_benchmark(tmp_path):
    metrics = {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25}
    write_json(tmp_path / "a" / "r.json", report("emoji", "ViT", "run@7", config.Zeroshot.task, metrics))
    text = (tmp_path / "a" / "r.json").read_text()
    assert list(json.loads(text)) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert json.loads(text)["metrics"] == metrics
    assert '"acc5": null' in text
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", {"x": float("nan")})
    assert not (tmp_path / "nan.json").exists()
