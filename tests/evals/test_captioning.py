"""Generated captions compared with a dataset's own: metrics by hand, perplexity in float64, the same results on every mesh."""

import dataclasses
import io
import json
import logging
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax import cli, config
from clipjax.config import ConfigError, Data
from clipjax.data.source import Record, Source
from clipjax.evals import caption_metrics as metrics
from clipjax.evals.captioning import CaptioningEvaluation, sheet
from clipjax.evals.encoder import Encoder
from clipjax.evals.training import make_evaluators
from clipjax.models import clip
from clipjax.status import CertainFailure
from tests.evals.tiny import LENGTH, MODEL, TOKENIZER, WORDS, mesh_of

COCA = dataclasses.replace(
    MODEL,
    image=dataclasses.replace(MODEL.image, pool="cascade", queries=3, pool_heads=2),
    text=dataclasses.replace(MODEL.text, pool="cls"),
    decoder=config.Decoder(depth=1, heads=2, mlp_dim=32),
)
READABLE = [0, 1, 2, 3, 5, 6, 7, 8, 9]


class InMemory(Source):
    """Images in memory, with any captions. The fifth can't be read."""

    name, fields = "toy/test", {}

    def __init__(self, images, captions):
        super().__init__()
        self.images, self.several = images, captions

    def __len__(self):
        return len(self.several)

    def _record(self, i):
        file = io.BytesIO()
        Image.fromarray(self.images[i]).save(file, "png")
        return Record(b"none" if i == 4 else file.getvalue(), tuple(self.several[i]), f"key {i}")


@pytest.fixture(scope="module")
def params():
    # Larger weights than an initialisation's, so that every image has words of its own.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, clip.init(COCA, 0))


@pytest.fixture(scope="module")
def toy(images):
    """Ten images: the fifth can't be read, the third has two captions."""
    return InMemory(images, [[w] + ["a photo"] * (i == 2) for i, w in enumerate(WORDS[:10])])


@pytest.fixture(scope="module")
def on_one(toy):
    return CaptioningEvaluation(Encoder(COCA, mesh_of("1"), 4), TOKENIZER, toy, Data(spec="emoji", workers=1))


@pytest.fixture(scope="module")
def found(on_one, params):
    return on_one.run(params)


def of(evaluation, captions):
    """The same evaluation, and its compiled programs, against other references."""
    other = CaptioningEvaluation(
        evaluation.encoder, TOKENIZER, InMemory(evaluation._source.images, captions), Data(spec="emoji", workers=1)
    )
    other._captioner, other._score = evaluation._captioner, evaluation._score
    return other


def test_images_that_can_be_read_have_captions_of_their_own(found):
    assert list(found.captions) == READABLE
    assert len(set(found.captions.values())) > 4
    assert found.metrics.keys() == {"exact_match", "perplexity", "bleu", "chrf", "cider"}
    assert found.metrics["exact_match"] == 0
    assert 0 < found.metrics["chrf"] < 100


@pytest.mark.parametrize(("mesh", "batch"), [("8", 16), ("2x2x2", 4)])
def test_devices_batches_and_padding_do_not_change_the_metrics(toy, params, found, mesh, batch):
    other = CaptioningEvaluation(Encoder(COCA, mesh_of(mesh), batch), TOKENIZER, toy, Data(spec="emoji", workers=1)).run(params)
    assert other.captions == found.captions
    assert other.metrics == pytest.approx(found.metrics, rel=1e-6)


def test_perplexity_in_float64(images, params, found):
    tokens = TOKENIZER.encode(WORDS[:10])[0][READABLE]

    @jax.jit
    def seen(params):
        model = clip.bind(COCA, params)
        return model.encode_pairs(images[READABLE], tokens)[2], model.words

    states, words = map(np.float64, seen(params))
    logits = states @ words.T
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    nll = []
    for row, ids in zip(logp, tokens, strict=True):
        ids = ids.tolist()
        nll += [-row[t - 1, ids[t]] for t in range(1, ids.index(TOKENIZER.end_id) + 1)]
    assert len(nll) < len(READABLE) * (LENGTH - 1)  # there is padding to leave out
    assert found.metrics["perplexity"] == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=1e-5)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(on_one, params):
    even = params | {"decoder": params["decoder"] | {"output": jax.tree.map(jnp.zeros_like, params["decoder"]["output"])}}
    assert on_one.run(even).metrics["perplexity"] == pytest.approx(COCA.text.vocab_size, rel=1e-6)


def test_a_generated_caption_is_correct_if_it_is_a_reference(on_one, params, found):
    own = [[found.captions.get(i, "none")] for i in range(10)]
    assert of(on_one, own).run(params).metrics | {"perplexity": None, "cider": None} == pytest.approx(
        {"exact_match": 1, "perplexity": None, "bleu": 100, "chrf": 100, "cider": None}
    )
    second = [["a fox", *one] if i % 2 else one for i, one in enumerate(own)]  # any reference will do
    assert of(on_one, second).run(params).metrics["exact_match"] == 1
    half = [["a fox"] if i < 5 else one for i, one in enumerate(own)]  # one of these can't be read
    assert of(on_one, half).run(params).metrics["exact_match"] == pytest.approx(5 / 9)


def test_without_a_caption_in_the_dataset_there_is_nothing_to_measure(on_one, params):
    with pytest.raises(ConfigError, match="'toy/test': none of its 10 examples has a caption, and captioning needs captions"):
        of(on_one, [[]] * 10)
    with pytest.raises(CertainFailure, match="toy/test: none of 10 examples can be used"):
        of(on_one, [[]] * 4 + [["a"]] + [[]] * 5).run(params)  # the one with a caption can't be read


def test_a_reference_counts_as_the_tokenizer_decodes_it(on_one):
    long = "fox " * 40
    accepted = of(on_one, [["One oʼclock"], [long]] + [["x"]] * 8)._accepted
    assert accepted[0] == ["One oʼclock", "one o'clock"]
    assert metrics.exact_match(["one o'clock"], [["One oʼclock"]]) == 0
    assert accepted[1] == [long]  # one that is cut can't be met by what is left of it
    assert TOKENIZER.encode([long])[1].all()


def test_exact_match_ignores_case_and_punctuation():
    wanted = [["Man: dark skin tone", "a man"], ["keycap #"], ["x"]]
    assert metrics.exact_match(["man dark  skin tone", "keycap *", "x"], wanted) == pytest.approx(2 / 3)
    assert metrics.exact_match(["A man!", "Keycap: #", ""], wanted) == pytest.approx(2 / 3)


def test_bleu_by_hand():
    assert metrics.bleu(["a b c d"], [["A b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))  # short
    assert metrics.bleu(["a b c d", "e f g h i"], [["z", "a b c d"], ["e f g h i"]]) == pytest.approx(100)
    six = ["a b c d e f"], [["a b c d x y"]]  # of 6, 5, 4, 3 n-grams 4, 3, 2, 1 are right
    assert metrics.bleu(*six) == pytest.approx(100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_chrf_by_hand():
    assert metrics.chrf(["abc"], [["ABD"]]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert metrics.chrf(["abc", "xyz"], [["abc"], ["q", "xyz"]]) == pytest.approx(100)


def test_cider_by_hand():
    wanted = [["a b c d e"], ["f g h i"]]
    assert metrics.cider(["A b, c d e!", "f g h i"], wanted) == pytest.approx(10)
    assert metrics.cider(["a b c d e", "z"], wanted) == pytest.approx(5)
    assert metrics.cider(["a b c d e"], wanted[:1]) is None
    # No n-gram is of both images, so all weigh alike; a word less costs a Gaussian of width 6.
    cosines = [4 / (4 * 5) ** 0.5, 3 / (3 * 4) ** 0.5, 2 / (2 * 3) ** 0.5, 1 / (1 * 2) ** 0.5]
    first = 10 * np.mean(cosines) * math.exp(-1 / 72)
    assert metrics.cider(["a b c d", "f g h i"], wanted) == pytest.approx((first + 10) / 2)
    assert metrics.cider(["a b", "a c"], [["a b"], ["a c"]]) == pytest.approx(10 * 2 / 4)  # `a` is of both and weighs nothing


def test_a_metric_without_its_package_is_none(on_one, params, found, toy, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with caplog.at_level(logging.WARNING):
        bare = of(on_one, toy.several).run(params).metrics
    want = "captioning: without sacrebleu and pycocoevalcap some metrics are null: pip install 'clipjax[captions]'"
    assert want in caplog.messages
    assert bare == found.metrics | {"bleu": None, "chrf": None, "cider": None}


def test_a_sheet_shows_every_sample(on_one, found):
    few, all_of_them = (on_one.samples(found.captions, n) for n in (3, 100))
    assert len(all_of_them) == len(READABLE)
    assert [s.key for s in few] == [s.key for s in all_of_them[:3]]
    assert {s.key: s.caption for s in all_of_them} == {f"key {i}": c for i, c in found.captions.items()}
    wide, narrow = (np.asarray(sheet(samples, "a title")) for samples in (few * 6, few))
    assert wide.shape[1] > 1.9 * narrow.shape[1]
    left = np.asarray(few[0].image.resize((148, 148), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(narrow[46:194, 8:156], left)
    assert (narrow[200:] != 255).any()  # the text


def run_of(tsv, model=COCA, **changes):
    spec = f"tsv:{tsv}/pairs.tsv"
    wanted = config.Captioning(data=spec, every=10, samples=2)
    train = config.Train(steps=5000, eval_batch_size=4, **changes)
    return config.Run(model=model, data=Data(spec=spec, workers=1), train=train, evals=(wanted,))


def test_in_training(tsv, params, tmp_path, capsys):
    run = run_of(tsv, best="captioning/exact_match")
    assert config.from_json(config.to_json(run)) == run
    (evaluator,) = make_evaluators(run, mesh_of("1"), TOKENIZER, tmp_path)
    found = evaluator.run(params, 20)
    shown = capsys.readouterr().err.splitlines()
    results = evaluator.evaluation.run(params)
    assert evaluator.task == "captioning"
    assert found.keys() == {"exact_match", "perplexity", "bleu", "chrf", "cider", "samples"}
    assert set(config.Captioning.metrics) < found.keys()
    assert {name: value for name, value in found.items() if name != "samples"} == results.metrics
    assert shown == [
        f"step 20  {evaluator.dataset}  {s.key}: {s.caption!r}, where the reference is {s.reference!r}" for s in results.samples
    ]
    assert len(shown) == 2
    (file,) = (tmp_path / "captioning").iterdir()
    assert file.name.endswith("pairs.tsv-000020.png")
    np.testing.assert_array_equal(np.asarray(Image.open(file)), found["samples"])


def test_what_is_impossible_is_refused_before_training(tsv, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.decoder = None: only a model with a captioning head"):
        make_evaluators(run_of(tsv, MODEL), mesh_of("1"), TOKENIZER)
    with pytest.raises(ConfigError, match=r"evals\.Captioning\.samples = -1"):
        config.Captioning(samples=-1)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    make_evaluators(run_of(tsv, best="captioning/exact_match"), mesh_of("1"), TOKENIZER)
    with pytest.raises(ConfigError, match=r"train\.best = 'captioning/bleu': needs sacrebleu: pip install 'clipjax\[captions\]'"):
        make_evaluators(run_of(tsv, best="captioning/bleu"), mesh_of("1"), TOKENIZER)
    with pytest.raises(ConfigError, match="no evaluation of this run gives it"):
        run_of(tsv, best="captioning/perplexity")


CONFIG = """
from clipjax.config import *

def config():
    shape = dict(width=16, depth=1, heads=2, mlp_dim=32, embed_dim=8)
    data = "tsv:pairs.tsv"
    return Run(
        data=Data(spec=data, workers=1),
        model=Model(
            image=ImageTower(image_size=8, patch_size=4, **shape),
            text=TextTower(length=12, vocab_size=300, **shape),
            decoder=Decoder(depth=1, heads=2, mlp_dim=32),
            dtype="float32",
        ),
        objective=(Softmax(), Caption()),
        optim=Optim(schedule=Constant(warmup=0)),
        train=Train(steps=2, batch_size=8, log_every=1, eval_batch_size=16),
        evals=(Captioning(data=data, every=100, samples=3),),
    )
"""


@pytest.mark.slow
def test_a_run_ends_with_what_the_command_line_finds(tsv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tsv)
    (tmp_path / "mine.py").write_text(CONFIG)
    assert cli.main(["train", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("step 2  tsv:pairs.tsv  ") == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.get("task") == "captioning"]
    assert line["step"] == 2
    assert [p.name for p in (tmp_path / "run" / "captioning").iterdir()] == ["tsv-pairs.tsv-000002.png"]
    assert b"captioning/tsv_pairs.tsv/samples" in b"".join(p.read_bytes() for p in (tmp_path / "run" / "tensorboard").iterdir())

    command = ["eval", "captioning", str(tmp_path / "run"), "--data", "tsv:pairs.tsv", "--samples", "9"]
    assert cli.main([*command, "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr()
    result = json.loads((tmp_path / "c.json").read_text())
    assert result == json.loads(said.out)
    metrics = result.pop("metrics")
    assert metrics == pytest.approx(line["metrics"], rel=1e-6)
    assert result == {
        "dataset": "tsv:pairs.tsv", "model": "run", "pretrained": "step 2", "task": "captioning", "language": "en",
    }  # fmt: skip
    assert f"image: {tmp_path / 'c.png'}" in said.err
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[1] > 3 * 148  # three rows of four
