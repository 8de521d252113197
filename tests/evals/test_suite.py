import dataclasses

import jax
import pytest

from clipjax import cli, config
from clipjax.config import ConfigError, Retrieval, Suite, SuiteMean, SuiteSet, Zeroshot
from clipjax.config.load import load_suite
from clipjax.config.packaged import suites
from clipjax.evals import results
from clipjax.evals.comparison import compare
from clipjax.evals.store import Store
from clipjax.evals.suite import Weights, measure, run_suite
from clipjax.evals.training import make_evaluators, prepare
from clipjax.export.imported import write_weights
from tests.evals.tiny import MODEL, TOKENIZER, Counting, mesh_of

RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")


@pytest.fixture
def suite(tsv):
    pairs, names = "tsv:{root}/pairs.tsv", "{root}/names.txt"
    sets = (
        SuiteSet(name="names", evaluation=Zeroshot(data=pairs, classnames=names, templates="plain"), main=("acc1",)),
        SuiteSet(name="pairs", evaluation=Retrieval(data=pairs), main=RECALLS, main_name="mean_recall@1", protocol="own"),
        SuiteSet(name="gone", evaluation=Retrieval(data="tsv:{root}/gone.tsv"), main=RECALLS),
        SuiteSet(name="mute", evaluation=config.Captioning(data=pairs), main=("cider",)),
    )
    there = SuiteMean(name="there", of=("names", "pairs"))
    return Suite(sets=sets, means=(there, SuiteMean(name="all", of=("names", "pairs", "gone"))))


@pytest.fixture
def run(tsv):
    return config.Run(
        model=MODEL, data=config.Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1), train=config.Train(eval_batch_size=4)
    )


def measured(suite, tsv, run, params, store=None, encoder=None):
    encoder = encoder or Counting(store)
    weights = Weights("tiny", "step 7", params)
    return measure(suite, str(tsv), lambda wanted: prepare(wanted, encoder, TOKENIZER, run.data), encoder, weights), encoder


def test_rows_and_means(suite, tsv, run, params, tmp_path):
    lines = []
    found, encoder = measured(suite, tsv, run, params, Store(tmp_path / "kept"))
    rows = {row.name: row for row in run_suite(found, tmp_path / "out", lines.append)}
    assert list(rows) == ["names", "pairs", "gone", "mute", "there", "all"]
    assert encoder.rows_seen == 12 + 12 + 12  # names, images once, 11 captions
    alone = prepare(suite.sets[1].evaluation.__class__(data=run.data.spec), encoder, TOKENIZER, run.data).run(params).metrics
    assert rows["pairs"].metrics == alone
    assert rows["pairs"].main == pytest.approx((alone[RECALLS[0]] + alone[RECALLS[1]]) / 2)
    assert (rows["pairs"].main_metric, rows["pairs"].n, rows["pairs"].unreadable) == ("mean_recall@1", 10 + 9, 1)
    assert rows["pairs"].ci95[0] <= rows["pairs"].main <= rows["pairs"].ci95[1]
    assert (rows["names"].n, rows["names"].unreadable, rows["names"].pretrained) == (9, 1, "step 7")
    assert "gone.tsv" in rows["gone"].absent
    assert "decoder" in rows["mute"].absent
    both = (rows["names"].main + rows["pairs"].main) / 2
    assert rows["there"].main == pytest.approx(both)
    assert rows["there"].ci95 is not None
    assert (rows["all"].main, rows["all"].ci95, rows["all"].absent) == (None, None, "1 of 3 sets have no figure: gone")
    assert rows["all"].metrics == {"mean": None, "mean_of_present": pytest.approx(both), "sets": 3}
    assert results.read(tmp_path / "out") == list(rows.values())
    assert {path.stem for path in (tmp_path / "out" / "examples").iterdir()} == {"names", "pairs"}
    assert len(lines) == 6
    assert lines[2].startswith("gone  image_retrieval_recall@1 + text_retrieval_recall@1  absent  data.spec = ")


def test_a_suite_that_was_killed_goes_on_and_embeds_nothing_twice(suite, tsv, run, params, tmp_path):
    store = Store(tmp_path / "kept")
    found, first = measured(suite, tsv, run, params, store)
    seen = next(found).row  # and then the process ends
    assert first.rows_seen == 12 + 12
    found, second = measured(suite, tsv, run, params, store)
    rows = run_suite(found, tmp_path / "out", lambda line: None)
    assert rows[0] == seen
    assert second.rows_seen == 12  # the captions of the next set
    third = Counting(store)
    found, _ = measured(suite, tsv, run, params, encoder=third)
    assert run_suite(found, tmp_path / "out", lambda line: None) == rows
    assert third.rows_seen == 0
    found, plain = measured(suite, tsv, run, params)
    assert run_suite(found, tmp_path / "plain", lambda line: None) == rows  # the same bits without a store
    assert plain.rows_seen == 48


def test_a_suite_of_which_nothing_is_there_is_refused(suite, tsv, run, params, tmp_path):
    nowhere = dataclasses.replace(suite, sets=suite.sets[2:], means=())
    found, _ = measured(nowhere, tsv, run, params)
    with pytest.raises(ConfigError, match="none of its 2 sets is there"):
        run_suite(found, tmp_path, lambda line: None)
    found, _ = measured(suite, "", run, params)
    assert next(found).row.absent.startswith("--root = '': name the folder that holds tsv:{root}/pairs.tsv")


def test_a_figure_that_the_evaluation_does_not_give_is_said(suite, tsv, run, params, tmp_path):
    names = suite.sets[0]
    typo = Suite(sets=(dataclasses.replace(names, main=("acc",)), dataclasses.replace(names, name="same")))
    rows = run_suite(measured(typo, tsv, run, params)[0], tmp_path, lambda line: None)
    assert rows[0].absent == "acc is not among its figures: acc1, acc5, mean_per_class_recall, macro_f1"
    assert (rows[0].main, rows[0].metrics) == (None, rows[1].metrics)
    assert [d.interval for d in compare(tmp_path, tmp_path, "acc1")[:2]] == [(0, 0), (0, 0)]
    assert compare(tmp_path, tmp_path)[0].note.startswith("absent in A: acc is not among its figures")


def test_a_store_that_does_not_answer_ends_the_suite(suite, params):
    """What is not there is absent; what may come back is no reason to give figures without it."""

    def unreachable(wanted):
        raise ConnectionError("no answer")

    encoder = Counting(None)
    with pytest.raises(ConnectionError):
        list(measure(suite, "/data", unreachable, encoder, Weights("tiny", "step 7", params)))


def test_a_suite_during_training(suite, tsv, run, params, tmp_path, caplog):
    (tmp_path / "mine.py").write_text(
        "from clipjax.config import Retrieval, Suite, SuiteMean, SuiteSet\n"
        "def suite():\n"
        "    sets = [SuiteSet(name=n, evaluation=Retrieval(data=f'tsv:{{root}}/{n}.tsv'), main=('pair_auc',))\n"
        "            for n in ('pairs', 'gone')]\n"
        "    sets.append(SuiteSet(name='typo', evaluation=sets[0].evaluation, main=('auc',)))\n"
        "    return Suite(sets=tuple(sets), means=(SuiteMean(name='all', of=('pairs', 'gone')),))\n"
    )
    wanted = config.RunSuite(suite=str(tmp_path / "mine.py"), root=str(tsv), every=50)
    (evaluator,) = make_evaluators(dataclasses.replace(run, evals=(wanted,)), mesh_of("8"), TOKENIZER)
    assert (evaluator.task, evaluator.dataset, evaluator.due(50)) == ("suite", "mine", True)
    assert "suite mine: gone is absent: " in caplog.text
    found, _ = measured(suite, tsv, run, params)
    want = [one.row for one in found][1].metrics["pair_auc"]
    for step in (50, 100):
        assert evaluator.run(params, step) == {"pairs": pytest.approx(want)}
    assert caplog.text.count("suite mine: typo is absent: auc is not among its figures: ") == 1
    assert caplog.text.count(" is absent: ") == 2
    with pytest.raises(ConfigError, match="leave it out: the suite names its sets"):
        dataclasses.replace(run, evals=(dataclasses.replace(wanted, data="emoji"),))


def test_the_command_of_an_image_tower(tsv, params, tmp_path, capsys):
    """Sets that need a text tower are absent; embeddings are kept in the run."""
    (tmp_path / "looks.py").write_text(
        "from clipjax.config import Instance, Retrieval, Suite, SuiteMean, SuiteSet\n"
        "def suite():\n"
        "    same, pairs = Instance(data='tsv:{root}/pairs.tsv'), Retrieval(data='tsv:{root}/pairs.tsv')\n"
        "    return Suite(root='/nowhere', means=(SuiteMean(name='all', of=('same', 'pairs')),), sets=(\n"
        "        SuiteSet(name='same', evaluation=same, main=('recall@1',)),\n"
        "        SuiteSet(name='pairs', evaluation=pairs, main=('pair_auc',))))\n"
    )
    model = config.Model(towers="image", image=MODEL.image, dtype="float32")
    file = config.TokenizerFile(path="tokenizer.json")
    alone = config.Run(model=model, data=config.Data(spec="emoji"), tokenizer=file, train=config.Train(eval_batch_size=4))
    out = tmp_path / "run"
    write_weights(alone, {"image": jax.device_get(params["image"])}, None, out, "a test")
    command = ["eval", "suite", str(out), str(tmp_path / "looks.py")]
    assert cli.main([*command, "--root", str(tsv)]) == 0
    same, pairs, mean = results.read(out / "suites" / "looks")
    assert same.n > 0
    assert 0 <= same.main <= 1
    assert "text" in pairs.absent
    assert mean.metrics["mean_of_present"] == same.main
    assert "all  mean  absent  1 of 2 sets have no figure: pairs" in capsys.readouterr().out
    (kept,) = (out / "embeddings").iterdir()
    before = kept.read_bytes()
    assert cli.main([*command, "--root", str(tsv), "--no-cache", "--out", str(tmp_path / "again")]) == 0
    assert results.read(tmp_path / "again") == [same, pairs, mean]
    assert kept.read_bytes() == before
    assert cli.main(command) == 2
    assert "none of its 2 sets is there: data.spec = " in capsys.readouterr().err


def test_a_suite_says_what_is_wrong_with_it(tmp_path):
    one = SuiteSet(name="a", evaluation=Retrieval(data="emoji"), main=RECALLS)
    for wrong, why in (
        (lambda: Suite(sets=()), "one set at least"),
        (lambda: Suite(sets=(one, one)), "sets.name = 'a': is used twice"),
        (lambda: Suite(sets=(one,), means=(SuiteMean(name="m", of=("b",)),)), "must be names of sets: mean m"),
        (lambda: dataclasses.replace(one, name="a/b"), "must be of letters"),
        (lambda: dataclasses.replace(one, evaluation=Retrieval()), "name the dataset of a"),
        (lambda: dataclasses.replace(one, evaluation=config.RunSuite(suite="quick")), "sets.evaluation = 'a': is a suite itself"),
        (lambda: load_suite("quik"), "SUITE = 'quik': must be clip_benchmark, datacomp, emoji, quick, or a file"),
        (lambda: load_suite(str(tmp_path / "no.py")), "is not a file"),
    ):
        with pytest.raises(ConfigError, match=why):
            wrong()


def test_the_suites_that_come_with_clipjax():
    found = {name: load_suite(name) for name in suites()}
    assert {name: len(suite.sets) for name, suite in found.items()} == {
        "clip_benchmark": 40, "datacomp": 38, "emoji": 2, "quick": 6,
    }  # fmt: skip
    sizes = {mean.name: len(mean.of) for mean in found["datacomp"].means}
    assert sizes == {"average": 38, "imagenet_shifts": 6, "vtab": 13, "retrieval": 3}
    mains = [one.main_name for one in found["datacomp"].sets]
    assert {name: mains.count(name) for name in mains} == {
        "acc1": 27, "mean_per_class_recall": 4, "F1-macro_all": 1, "acc_worst_region": 1, "acc_top5_wg": 1, "acc_wg": 1,
        "mean_recall@1": 2, "jaccard_score_10-12": 1,
    }  # fmt: skip
    assert {mean.name: len(mean.of) for mean in found["clip_benchmark"].means} == {
        "vtab+": 35, "vtab": 19, "imagenet_robustness": 5, "retrieval": 3,
    }  # fmt: skip
