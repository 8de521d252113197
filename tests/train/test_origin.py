"""A new workdir that starts from another run's whole state."""

import dataclasses
import json
import shutil

import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.train.report import say_finished
from tests.test_cli import overridden
from tests.train import tiny
from tests.train.test_memory import ISOGCLR
from tests.train.test_trouble import AVERAGED, RUN, SKIP, during, lines, same, spoiled, train_in

# All that a state can have.
EVERYTHING = dataclasses.replace(during(SKIP, checkpoint_every=3), objective=ISOGCLR, optim=AVERAGED)


def from_run(run, origin, **changes):
    return dataclasses.replace(run, init=config.Init(run=str(origin), state="all"), **changes)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A run of eight steps, saved at 3, 6 and 8: its workdir, and its last state."""
    workdir = tmp_path_factory.mktemp("origin") / "run"
    return workdir, train_in(workdir, EVERYTHING, spoiled(2))


def test_it_goes_on_as_the_other_run_did(origin, tmp_path, capsys):
    """Bit for bit. What it starts with is in its own first checkpoint: it needs the other run no more."""
    path, want = origin
    shutil.copytree(path, tmp_path / "old")
    run = from_run(EVERYTHING, f"{tmp_path}/old@3")
    assert same(train_in(tmp_path / "new", run, spoiled(2)), want)
    assert f"{tmp_path}/new: starts from {tmp_path}/old@3 at step 3 of 8\n" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "new")] == [4, 5, 6, 7, 8]
    shutil.rmtree(tmp_path / "old")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "new" / "checkpoints" / str(step))
    assert same(train_in(tmp_path / "new", run, spoiled(2)), want)


def test_what_changes_is_told(origin, tmp_path, capsys):
    path, _ = origin
    changed = during(EVERYTHING, steps=5, skip=((1, 2), (4, 5)))
    optim = dataclasses.replace(AVERAGED, lr=1e-4, clip_norm=None, schedule=config.Cosine(warmup=2))
    assert int(train_in(tmp_path, from_run(changed, f"{path}@3", optim=optim, seed=7), spoiled(2)).step) == 5
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "starts from" in line]
    for change in (
        "seed = 7",
        "optim.lr = 0.0001",
        "optim.clip_norm = None",
        "optim.schedule.kind = 'cosine'",
        "train.steps = 5",
    ):
        assert change in line
    assert "init" not in line
    assert "the order of the data is another one: it goes on with its batch 5" in said


def test_a_workdir_with_checkpoints_goes_on_from_its_own(origin):
    path, _ = origin
    with pytest.raises(
        ConfigError, match=rf"^init\.run = '{path}@3': {path} has checkpoints, .* new --workdir, or set init to None$"
    ):
        tiny.opened(from_run(EVERYTHING, f"{path}@3"), path)


def averaging(**changes):
    return dict(optim=dataclasses.replace(AVERAGED, **changes))


def training(**changes):
    return dict(train=dataclasses.replace(EVERYTHING.train, **changes))


DEEPER = dataclasses.replace(tiny.CLIP, image=dataclasses.replace(tiny.CLIP.image, depth=3))
MORE = training(steps=9)
UNFIT = {
    "no run": (MORE, "{}/elsewhere", r"init\.run = '.*elsewhere': is not a workdir of `clipjax train`"),
    "no step": (MORE, "{}@4", r"init\.run = '.*@4': has checkpoints of steps 3, 6, 8 only$"),
    "steps": (training(steps=6), "{}@6", r"train\.steps = 6: .*@6 has 6 finished steps already: ask for more$"),
    "model": (MORE | dict(model=DEEPER), "{}", r"init\.run = .*model\.image\.depth: 2 -> 3\n.*\[2, .* -> .*\[3, .*more arrays$"),
    "objective": (
        MORE | dict(objective=(config.Softmax(),)),
        "{}",
        r"init\.run = .*objective\.0\.kind: 'isogclr' -> 'softmax'\n.*memory/",
    ),
    "average": (MORE | averaging(ema=None), "{}", r"init\.run = .*\n  optim\.ema: 0\.9 -> None\n  ema/"),
    "optimizer": (MORE | averaging(kind="lamb"), "{}", r"init\.run = .*\n  optim\.kind: 'adamw' -> 'lamb'"),
    "type": (MORE | averaging(mu_dtype="bfloat16"), "{}", r"init\.run = .*\n  optim\.mu_dtype: 'float32' -> 'bfloat16'\n"),
    "tokenizer": (
        MORE | dict(tokenizer=config.BPE(lowercase=False)),
        "{}",
        r"init\.run = .*\n  tokenizer\.lowercase: True -> False$",
    ),
    "data": (MORE | dict(data=config.Data(spec="tsv:x.tsv")), "{}", r"init\.run = .*\n  data\.spec: 'emoji' -> 'tsv:x\.tsv'$"),
    "batches": (training(skip=((1, 2),)), "{}@6", r"train\.skip = .*from a step of 1 at most$"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_state_that_does_not_fit_is_refused_by_name(origin, tmp_path, name):
    changes, where, message = UNFIT[name]
    run = from_run(EVERYTHING, where.format(origin[0]), **changes)
    with pytest.raises(ConfigError, match=f"(?s)^{message}"):
        tiny.opened(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_state_is_wrong_use(origin, tmp_path):
    shutil.copytree(origin[0], tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "6" / "params" / "d")
    (tmp_path / "old" / "checkpoints" / "8" / "config" / "metadata").unlink()
    for step in (6, 8):
        run = from_run(EVERYTHING, f"{tmp_path}/old@{step}", **MORE)
        with pytest.raises(ConfigError, match=rf"^init\.run = '.*old@{step}': .* can't be read: .*; name another step"):
            train_in(tmp_path / "new", run, spoiled(2))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("schedule", "grows"), [(config.Constant(warmup=3), True), (config.Cosine(warmup=3), False)])
def test_the_end_of_a_run_says_how_to_go_on(tmp_path, capsys, schedule, grows):
    say_finished(dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, schedule=schedule)), tmp_path)
    said = capsys.readouterr().err
    assert f"{tmp_path}: finished, with all its 8 steps; " in said
    assert ("raise train.steps" in said) == grows
    assert (f"init = Init(run='{tmp_path}', state='all')" in said) != grows


def test_it_is_an_option():
    assert overridden("--init.run", "runs/a@3", "--init.state=all").init == config.Init(run="runs/a@3", state="all")
    assert overridden("--seed", "1").init is None
    for wrong in ("--init", "--init.rnu"):
        with pytest.raises(ConfigError, match=rf"^{wrong}: there is no such field; the nearest is --init\.run"):
            overridden(wrong, "runs/a")
    assert overridden("--init.run", "runs/a").init == config.Init(run="runs/a", state="weights")
    allowed = overridden("--init.image", "runs/a", "--init.text", "runs/b", "--init.allow", "text/.*", "decoder/.*").init
    assert allowed == config.Init(image="runs/a", text="runs/b", allow=("text/.*", "decoder/.*"))
    for wrong, message in (("--init.image", "must name a workdir"), ("--init.allow", "'all' is of init.run alone")):
        with pytest.raises(ConfigError, match=message):
            overridden("--init.state", "all", wrong, "runs/a", *(() if wrong == "--init.image" else ("--init.run", "a")))
    with pytest.raises(ConfigError, match=r"^init\.allow\.0 = '\(': is not a regular expression"):
        config.Init(run="a", allow=("(",))


def test_a_configuration_of_before_has_the_whole_state():
    tree = json.loads(config.to_json(EVERYTHING)) | dict(init=dict(run="runs/a@3", state="all"))
    assert config.from_json(json.dumps(tree)).init == config.Init(run="runs/a@3", state="all")
    with pytest.raises(ConfigError, match=r"^init\.run = '': must name a workdir"):
        overridden("--init.run=", "--init.state", "all")
