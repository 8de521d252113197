"""The loop on batches from memory: one compilation, failing and colliding evaluations, what is said and what is written."""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.config import ConfigError
from clipjax.metrics.clock import Clock
from clipjax.restore import newest
from clipjax.train import loop
from clipjax.train.loop import train
from clipjax.train.optimizer import learning_rate
from clipjax.train.workdir import Saved, open_workdir
from tests.train import tiny

TRAIN = config.Train(steps=12, batch_size=16, log_every=5, checkpoint_every=4, keep=9)
RUN = tiny.run(train=TRAIN, optim=dataclasses.replace(tiny.OPTIM, schedule=config.Constant(warmup=3)))
FOUND = "zeroshot_retrieval/image_retrieval_recall@1"


def during(evals=(), **changes):
    """RUN with another `train`."""
    return dataclasses.replace(RUN, train=dataclasses.replace(TRAIN, **changes), evals=evals)


def batches(**marks):
    """The same examples for every start, with what else there is in a batch; a number: so many were repaired."""
    made = tiny.batches(RUN, TRAIN.steps)
    counts = {name: marks.pop(name) for name, value in list(marks.items()) if isinstance(value, int)}
    marks = tiny.marks(16, **counts) | marks
    return lambda start: contextlib.nullcontext(iter([batch | marks for batch in made[start:]]))


@dataclasses.dataclass
class Evaluator:
    """Gives a value a call, or raises it."""

    values: list
    every: int = 4
    dataset: str = "emoji/test"
    task: str = "zeroshot_retrieval"

    def due(self, step):
        return step % self.every == 0

    def run(self, params, step):
        assert np.isfinite(np.asarray(params["log_scale"]))
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return {"image_retrieval_recall@1": value}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def run_it(run, workdir, evaluators=(), **marks):
    return tiny.train_in(workdir, run, batches(**marks), list(evaluators), tiny.mesh_of(2))


@pytest.mark.slow
def test_the_step_is_compiled_once_also_after_a_restore(tmp_path, caplog):
    for run in (during(steps=6), RUN):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            state = run_it(run, tmp_path)
        compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(train_step)" in r.getMessage()]
        assert len(compiled) == 1
    whole = run_it(RUN, tmp_path / "whole")
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), state, whole))


def test_lines_are_printed_once_and_with_their_own_step(tmp_path, capsys):
    run_it(RUN, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    losses = {r["step"]: f"loss {r['loss']:.4g}" for r in records(tmp_path)}
    assert [tuple(line.split("  ")[:2]) for line in said] == [(f"step {n}/12", losses[n]) for n in (5, 10, 12)]


def test_a_failing_evaluation_costs_no_checkpoint(tmp_path):
    failing = Evaluator([0.25, OSError("the disk of the test set is gone")])
    with pytest.raises(OSError, match="is gone"):
        run_it(RUN, tmp_path, [failing])
    assert steps_on_disk(tmp_path) == [4, 8]
    assert [(r["step"], r["metrics"]) for r in records(tmp_path) if "task" in r] == [(4, {"image_retrieval_recall@1": 0.25})]
    run_it(RUN, tmp_path, [Evaluator([0.375, 0.5])])  # the one that failed is made up for
    assert [(r["step"], *r["metrics"].values()) for r in records(tmp_path) if "task" in r] == [(4, 0.25), (8, 0.375), (12, 0.5)]
    whole = [r["loss"] for r in records(tmp_path) if "loss" in r]
    run_it(RUN, tmp_path / "whole")
    assert whole == [r["loss"] for r in records(tmp_path / "whole")]
    assert steps_on_disk(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize(("split", "kept"), [("test", 4), ("train", 8)])
def test_two_evaluations_of_one_task_do_not_collide(tmp_path, split, kept):
    evals = (config.Retrieval(), config.Retrieval(split="train"))
    best = f"zeroshot_retrieval/emoji/{split}/image_retrieval_recall@1"
    run = during(evals, keep=1, best=best)
    evaluators = [Evaluator([0.9, 0.1, 0.2]), Evaluator([0.3, 0.8, 0.4], dataset="emoji/train")]
    run_it(run, tmp_path, evaluators)
    assert steps_on_disk(tmp_path) == [kept, 12]


def test_the_best_of_the_only_evaluation_of_a_task_needs_no_dataset(tmp_path):
    run = during((config.Retrieval(),), keep=1, best=FOUND)
    run_it(run, tmp_path, [Evaluator([0.1, 0.9, 0.2])])
    assert steps_on_disk(tmp_path) == [8, 12]


class Examples(list):
    """Stands for a source, of which the loop asks the name and the number of examples."""

    name = "tsv:pairs.tsv"


def test_lines_say_how_far_the_run_is_and_where_its_time_went(tmp_path, capsys):
    """Step, place in the data and learning rate go on where a run resumes; batches that are left out were passed, not seen."""
    skip = during(steps=12, log_every=2, skip=((7, 9),))
    for steps in (6, 12):
        run = dataclasses.replace(skip, train=dataclasses.replace(skip.train, steps=steps))
        with open_workdir(run, tmp_path, tiny.mesh_of(2)) as workdir:
            train(run, workdir, batches(bad=4), [Evaluator([0.5, 0.5])], tiny.mesh_of(2), Examples([None] * 100))
    said = capsys.readouterr().err
    assert "6 steps of 16 = 96 examples, 0.96 epochs of tsv:pairs.tsv (100)\n" in said
    assert "12 steps of 16 = 192 examples, 1.9 epochs of tsv:pairs.tsv (100)\n" in said
    lines = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in lines] == [2, 4, 6, 8, 10, 12]
    assert [r["examples_seen"] for r in lines] == [16 * r["step"] for r in lines]
    assert [r["epoch"] for r in lines] == [0.32, 0.64, 0.96, 1.6, 1.92, 2.24]
    rate = learning_rate(RUN.optim, 12)
    assert [np.float32(r["lr"]) for r in lines] == [rate(r["step"] - 1) for r in lines]
    assert {(r["bad_share"], r["skipped_steps"]) for r in lines} == {(0.25, 0)}
    spent = {r["step"]: (r["save_seconds"] > 0, r["eval_seconds"] > 0) for r in lines}  # after steps 4, 6, 8
    assert spent == {2: (0, 0), 4: (0, 0), 6: (1, 1), 8: (0, 0), 10: (1, 1), 12: (0, 0)}
    assert all(0 < r["useful_share"] <= 1 for r in lines)
    assert all(r["useful_share"] < 1 for r in lines if r["save_seconds"])
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert not [key for key in lines[-1].keys() - {"softmax_loss"} if f"`{key}`" not in page]


def test_the_best_so_far_is_known_when_a_run_resumes(tmp_path):
    run_it(during((config.Retrieval(),), steps=8, keep=1, best=FOUND), tmp_path, [Evaluator([0.9, 0.1])])
    assert steps_on_disk(tmp_path) == [4, 8]
    run_it(during((config.Retrieval(),), keep=1, best=FOUND), tmp_path, [Evaluator([0.2])])
    assert steps_on_disk(tmp_path) == [4, 12]


def test_a_failing_evaluation_of_one_process_costs_no_step(tmp_path):
    with pytest.raises(ValueError, match="a mistake"):
        run_it(RUN, tmp_path, [Evaluator([ValueError("a mistake")], every=3)])
    assert steps_on_disk(tmp_path) == [3]


def everything(workdir):
    return {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    run_it(RUN, tmp_path)
    before = everything(tmp_path)
    run_it(during(log_every=3), tmp_path)
    assert "finished, with all its 12 steps" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_a_resumed_run_says_what_has_changed(tmp_path, capsys):
    run_it(during(steps=6), tmp_path)
    run_it(during(log_every=3), tmp_path)
    said = capsys.readouterr().err
    assert f"{tmp_path}: resuming at step 6 of 12; changed: train.steps = 12; train.log_every = 3\n" in said
    assert config.from_json((tmp_path / "config.json").read_text()) == during(log_every=3)


def frozen(pattern):
    return dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, rules=(config.Rule(pattern=pattern), *config.RULES)))


UNSOUND = {
    "batch": (during(batch_size=18), (4,), r"train\.batch_size = 18: must be a multiple of the 4 devices"),
    "heads": (
        RUN,
        (1, 1, 8),
        r"mesh\.tensor = 8: must divide .* model\.image\.heads = 4, model\.text\.heads = 4; use a divisor of 4",
    ),
    "fsdp": (during(batch_size=15), (1, 5), r"mesh\.fsdp = 5: only \d+% of the bytes"),
    "rule": (frozen("imgae/.*"), (1,), r"optim\.rules\.0\.pattern = 'imgae/\.\*': no parameter is left for it"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_can_not_be_trained_leaves_no_workdir(name, tmp_path):
    run, shape, message = UNSOUND[name]
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny.train_in(tmp_path / "run", run, batches(), [], tiny.mesh_of(*shape))
    assert not (tmp_path / "run").exists()


def test_mlps_that_do_not_divide_are_named():
    model = dataclasses.replace(tiny.CLIP, text=dataclasses.replace(tiny.CLIP.text, heads=8, mlp_dim=68))
    with pytest.raises(
        ConfigError, match=r"^mesh\.tensor = 8: .* divide model\.image\.heads = 4, model\.text\.mlp_dim = 68; .* of 4$"
    ):
        sharding.check_tensor(model, tiny.mesh_of(1, 1, 8))
    sharding.check_tensor(model, tiny.mesh_of(1, 1, 4))
    sharding.check_tensor(model, tiny.mesh_of(8))


def test_another_runs_workdir_is_left_as_it_is(tmp_path):
    run_it(during(steps=4), tmp_path)
    before = everything(tmp_path)
    for other, message in (
        (dataclasses.replace(RUN, seed=1), r"another run.*\n  seed: 0 -> 1$"),
        (during(steps=3), "ask for 4 at least"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.opened(other, tmp_path)
    assert everything(tmp_path) == before
    assert tiny.opened(RUN, tmp_path).saved == Saved(4, during(steps=4))
    assert newest(tmp_path / "nowhere") is None


def test_what_was_repaired_is_counted_by_line_and_said_in_the_end(tmp_path, capsys):
    run_it(during(steps=8), tmp_path, truncated=3)
    said = capsys.readouterr().err
    assert "24 of 128 captions were truncated to model.text.length = 8 tokens" in said
    assert "examples were" not in said
    run_it(RUN, tmp_path, bad=1, filtered=4)
    said = capsys.readouterr().err
    assert "4 of 64 examples were bad" in said
    assert "16 of 64 examples (25%) were left out by data.filter" in said
    assert "captions" not in said
    counts = [(r["step"], r["replaced"], r["filtered"], r["truncated"]) for r in records(tmp_path)]
    assert counts == [(5, 0, 0, 15), (8, 0, 0, 9), (10, 2, 8, 0), (12, 2, 8, 0)]
    assert [r["bad_share"] for r in records(tmp_path)] == pytest.approx([0, 0, 1 / 12, 1 / 12])  # of those that were not left out
    assert [r["filtered_share"] for r in records(tmp_path)] == [0, 0, 0.25, 0.25]
    run_it(RUN, tmp_path / "sound")
    said = capsys.readouterr().err
    assert "were" not in said
    several = dataclasses.replace(during(steps=8), data=config.Data(spec="emoji", captions_per_image=3))
    cut = np.arange(48).reshape(16, 3) < 18
    run_it(several, tmp_path / "several", truncated=cut)
    assert "144 of 384 captions were truncated" in capsys.readouterr().err


class Loss:
    """A result of step t, which is computed once somebody has waited for it."""

    def __init__(self, t, calls):
        self.t, self.calls = t, calls

    def block_until_ready(self):
        self.calls.append(("wait", self.t))

    def is_ready(self):
        return ("wait", self.t) in self.calls


def test_the_next_batch_is_on_its_way_while_a_step_runs():
    """Batch t is read and put on the devices when step t - 2 is done, and nobody has waited for step t - 1."""
    calls, time = [], iter(range(0, 10_000, 10))
    devices = object.__new__(loop._Devices)
    devices.state, devices._losses = {}, collections.deque(maxlen=loop.STEPS_AHEAD)
    devices.put = lambda batch: calls.append(("put", batch)) or batch
    devices._step = lambda state, batch: calls.append(("step", batch)) or (state, {"loss": Loss(batch, calls)})
    clock = Clock(lambda: next(time))
    report = SimpleNamespace(clock=clock, counts=SimpleNamespace(count=lambda batch: None))
    data = (calls.append(("read", t)) or t for t in itertools.count())
    it = loop._Loop(TRAIN, SimpleNamespace(start=0), devices, data, None, report, None)
    for t in range(1, 6):
        it._train_step(t)
    ahead = [[("read", t), ("put", t), ("step", t)] for t in range(5)]
    assert calls == [*ahead[0], *ahead[1], *(call for t in range(2, 5) for call in (("wait", t - 2), *ahead[t]))]
    assert clock.read()["data_wait"] == pytest.approx(10 / 70)  # of the first batch alone: the others come while a step runs


def test_what_a_batch_has_reaches_the_devices(tmp_path, monkeypatch):
    """All that a loss may need, row by row over the mesh; what is counted stays on the host."""
    from clipjax.train import loop

    jit_step, seen = loop.jit_step, []

    def watched(*args):
        step = jit_step(*args)
        return lambda state, rows: (seen.append(rows), step(state, rows))[1]

    monkeypatch.setattr(loop, "jit_step", watched)
    numbers, rows = np.arange(16, dtype=np.int32), np.arange(48, dtype=np.float32).reshape(16, 3)
    more = {"index": numbers, "id": numbers // 2, "teacher_image": rows, "teacher_text": -rows}
    run_it(during(steps=4), tmp_path, **more)
    assert len(seen) == 4
    for batch in seen:
        assert batch.keys() == {"image", "text", *more}
        for name, value in more.items():
            np.testing.assert_array_equal(batch[name], value)
            assert batch[name].sharding == sharding.over_rows(tiny.mesh_of(2))
