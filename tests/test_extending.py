"""What a config file outside the package brings: it is trained with, overridden, reopened, and missed where it is not loaded.

The files are those of docs/extending.md, as a reader would copy them.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import clipjax
from clipjax import cli, config
from clipjax.config import ConfigError, Term, TrainingEvaluation
from clipjax.config.load import load_config
from tests.test_docs import FILE

DOCS = Path(__file__).parents[1] / "docs" / "extending.md"
SMALL = (
    "--train.steps 3 --train.batch_size 16 --train.log_every 1 --model.image.depth 1 --model.text.depth 1 --model.image.width 48 "
    "--model.image.mlp_dim 48 --model.text.width 48 --model.text.mlp_dim 48 --optim.schedule.warmup 1 --data.workers 1"
)


def example(name: str, folder: Path) -> Path:
    """A file that the page tells the reader to write."""
    file = folder / name
    file.write_text(dict(FILE.findall(DOCS.read_text()))[name])
    return file


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def test_a_loss_of_a_config_file_is_trained_with_and_reopened(tmp_path, capsys):
    file, workdir = example("margin.py", tmp_path), tmp_path / "run"
    assert run("train", file, "--workdir", workdir, "--objective.0.margin", "0.3", *SMALL.split()) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["margin_softmax_loss"] for line in lines] == [line["loss"] for line in lines if line["loss"] > 0]
    assert len(lines) == 3

    text = (workdir / "config.json").read_text()
    entry = {"class": "MarginSoftmax", "file": str(file.resolve())}
    assert json.loads(text)["registered"] == {"objective": {"margin_softmax": entry}}
    term = config.from_json(text).objective[0]
    assert (term.kind, term.margin, type(term).__name__) == ("margin_softmax", 0.3, "MarginSoftmax")
    assert (
        run("train", file, "--workdir", workdir, "--objective.0.margin", "0.3", *SMALL.split()) == 0
    )  # it goes on, with nothing to do
    assert run("train", file, "--workdir", workdir, "--objective.0.margin", "-1", *SMALL.split()) == 2
    assert "objective.0.margin = -1.0: must lie in [0, 2)" in capsys.readouterr().err

    del Term.members["margin_softmax"]  # as in a process that has not loaded the file
    message = (
        f"objective: the run uses the class MarginSoftmax of {file.resolve()}: name that file with --config, or load it first"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.from_json(text)
    assert run("embed", workdir, "--data", "emoji", "--out", tmp_path / "test.npz") == 2
    assert message in capsys.readouterr().err
    load_config(str(file))
    assert clipjax.load(workdir).run.objective[0].margin == 0.3


def test_an_evaluation_of_a_config_file_runs_in_training_and_chooses_the_best_checkpoint(tmp_path, capsys):
    file, workdir = example("rank.py", tmp_path), tmp_path / "run"
    assert run("train", file, "--workdir", workdir, "--evals.0.every", 2, "--evals.0.pairs", 50, *SMALL.split()) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "task" in line]
    assert [line["step"] for line in found] == [2, 3]
    assert {(line["task"], line["dataset"]) for line in found} == {("rank", "emoji/test")}
    for line in found:
        assert line["metrics"].keys() == {"median_rank", "mean_reciprocal_rank"}
        assert 1 <= line["metrics"]["median_rank"] <= 50
        assert 1 / 50 <= line["metrics"]["mean_reciprocal_rank"] < 1
    assert "step 3  rank on emoji/test: median_rank" in capsys.readouterr().err

    run_config = config.from_json((workdir / "config.json").read_text())
    assert (run_config.evals[0].pairs, run_config.train.best) == (50, "rank/mean_reciprocal_rank")
    entry = {"class": "Rank", "file": str(file.resolve())}
    assert json.loads((workdir / "config.json").read_text())["registered"] == {"evals": {"rank": entry}}
    assert run("train", file, "--workdir", tmp_path / "other", "--train.best", "rank/median_rank", *SMALL.split()) == 2
    message = "train.best = 'rank/median_rank': no evaluation of this run gives it; the nearest is rank/mean_reciprocal_rank"
    assert message in capsys.readouterr().err
    del TrainingEvaluation.members["rank"]  # as in a process that has not loaded the file
    assert run("eval", "retrieval", workdir, "--data", "emoji") == 2
    assert f"evals: the run uses the class Rank of {file.resolve()}: name that file with --config" in capsys.readouterr().err


def test_the_example_costs_what_it_says(tmp_path):
    from clipjax import losses

    term = load_config(str(example("margin.py", tmp_path))).objective[0]
    assert losses.term_flops(term, losses.Sizes(16, 1, 8)) == 8 * 16**2 * 8


@dataclass(frozen=True, kw_only=True)
class Hinge(Term):
    kind: Literal["hinge"] = "hinge"


@dataclass(frozen=True, kw_only=True)
class Another(Term):
    kind: Literal["hinge"] = "hinge"


@dataclass(frozen=True, kw_only=True)
class Taken(Term):
    kind: Literal["softmax"] = "softmax"


@dataclass(frozen=True, kw_only=True)
class NoKind(Term):
    margin: float = 0.1


@dataclass(frozen=True, kw_only=True)
class NoDefault(Term):
    kind: Literal["hinge"]


@dataclass(frozen=True, kw_only=True)
class AnyKind(Term):
    kind: str = "hinge"


class Bare(Term):
    pass


@dataclass(frozen=True, kw_only=True)
class NoTask(TrainingEvaluation):
    kind: Literal["hinge"] = "hinge"


@dataclass(frozen=True, kw_only=True)
class NoWork(TrainingEvaluation):
    task: ClassVar = "hinge"
    kind: Literal["hinge"] = "hinge"


@dataclass(frozen=True)
class Alone:
    kind: Literal["hinge"] = "hinge"


def nothing(term, rows, scale, bias, axis):
    raise AssertionError


REFUSED = {
    "taken": (Taken, "Taken.kind = 'softmax': is that of Softmax of clipjax already: choose another"),
    "another's": (Another, f"Another.kind = 'hinge': is that of Hinge of {__file__} already: choose another"),
    "no kind": (NoKind, "clipjax.register = 'NoKind': needs the field `kind: Literal[\"NAME\"]"),
    "no default": (NoDefault, "clipjax.register = 'NoDefault': needs the field `kind"),
    "any kind": (AnyKind, "clipjax.register = 'AnyKind': needs the field `kind"),
    "no dataclass": (Bare, "clipjax.register = 'Bare': must be a dataclass: write @dataclass(frozen=True, kw_only=True)"),
    "no task": (NoTask, "clipjax.register = 'NoTask': needs `task: ClassVar"),
    "no evaluation": (NoWork, "clipjax.register = 'NoWork': its class must derive from clipjax.evals.evaluation.Evaluation"),
    "no base": (Alone, "clipjax.register = 'Alone': must be a class that derives from clipjax.config.Term or"),
    "no class": (nothing, "clipjax.register = 'nothing': must be a class that derives from"),
}


@pytest.mark.parametrize(("refused", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_class_that_does_not_differ_from_others_is_refused(refused, message):
    clipjax.register(Hinge, nothing)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        clipjax.register(refused, nothing)


def test_a_class_can_be_registered_again():
    clipjax.register(Hinge, nothing)
    clipjax.register(Hinge, print)
    assert Hinge().implementation.function is print


def test_a_class_that_is_not_registered_is_refused_where_it_is_used():
    with pytest.raises(ConfigError, match=r"^objective\.1 = 'Hinge': is not registered: call clipjax\.register\(Hinge, \.\.\.\)"):
        config.Run(data=config.Data(spec="emoji"), objective=(config.Softmax(), Hinge()))


def test_clipjaxs_own_classes_all_have_their_function():
    from clipjax import losses

    assert losses.TERMS.keys() == {member.config for member in Term.members.values() if member.source is None}
    fewer = {c: binding for c, binding in losses.TERMS.items() if c is not config.Cyclip}
    with pytest.raises(TypeError, match="classes of Term that nothing is bound to: Cyclip"):
        Term.bind(fewer)
