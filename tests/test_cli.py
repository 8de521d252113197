"""The command line in process: help, overrides, refusals, and every command on a run of seconds."""

import ast
import csv
import dataclasses
import errno
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import clipjax
from clipjax import cli, commands, config
from clipjax.config import ConfigError
from clipjax.status import BROKEN_PIPE_STATUS, CertainFailure
from clipjax.storage import DamagedError
from tests.train import tiny_emoji

CONFIG = str(Path(tiny_emoji.__file__))
STEPS = ["--train.steps", "6", "--train.checkpoint_every", "3", "--optim.schedule.warmup", "2", "--evals.0.every", "3"]


def run(*args) -> int:
    """The exit status, however it comes."""
    try:
        return cli.main([str(a) for a in args])
    except SystemExit as e:
        return e.code or 0


COMMANDS = {
    "": ["train", "configs", "eval", "embed", "export", "import", "plan", "data", "bench", "3 failed, and the same command will"],
    "configs": ["NAME", "print this one"],
    "plan": ["CONFIG.py|NAME", "--topology", "--slices N", "--find-batch", "--json OUT"],
    "train": ["--workdir RUN", "--profile FROM:TO", "CONFIG.py|NAME"],
    f"train {CONFIG}": ["--train.steps INT", "--model.image.patch-dropout", "--evals.0.every", "(default: 0.25)", "steps"],
    "eval": ["zeroshot", "retrieval", "geometry", "captioning"],
    "eval zeroshot": [
        "--data SPEC",
        "--split",
        "--classnames NAME|FILE",
        "--predictions FILE",
        "--templates NAME|FILE",
        "--json OUT",
    ],
    "eval retrieval": ["--data SPEC", "--split", "--json OUT", "(default: test)", "--languages NAMES"],
    "eval relative": ["A", "B", "--data SPEC", "--anchors SPLIT", "(default: train)", "--json OUT"],
    "eval instance": ["--data SPEC", "--split", "--json OUT", "--gallery SPEC", "--gallery-split SPLIT"],
    "eval probe": ["--train SPLIT", "--label-pattern REGEX", "--methods", "{embedding,tower}", "linear"],
    "eval transfer": ["--train SPLIT", "--label-pattern REGEX", "--noise X", "(default: 1.0)"],
    "eval calibration": ["--classnames NAME|FILE", "--templates NAME|FILE", "--json OUT"],
    "eval geometry": ["--data SPEC", "--split", "--json OUT", "--png OUT", "geometry-SPEC-SPLIT.png"],
    "eval captioning": ["--data SPEC", "--split", "--json OUT", "--png OUT", "captioning-SPEC-SPLIT.png", "(default: 32)"],
    "embed": ["--data SPEC", "--out FILE.npz"],
    "caption": ["IMAGE", "--json OUT", "(nats)", "--beams N", "--temperature T", "--top-k K", "(default: all)", "--seed N"],
    "export": [
        "--config CONFIG.py",
        "--to {open_clip,transformers}",
        "--out DIR",
        "--dtype {float32,",
        "--verify",
        "(default: 32)",
    ],
    "import": ["SRC", "--from {open_clip,transformers,big_vision}", "--out RUN", "a model of the hub"],
    "average": ["RUN [RUN ...]", "--alpha X", "--weights W", "--out RUN", "WiSE-FT"],
    "bench": ["loss"],
    "bench loss": ["--batch N", "--topology T", "--travel {ring,gather,auto}", "(default: 7)", "in pairs", "--json OUT"],
    "data": ["prepare", "inspect"],
    "data prepare": ["emoji"],
    "data inspect": ["SPEC", "--png OUT", "--json OUT", "--length", "tokens"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert run(*command.split(), "--help") == 0
    said = capsys.readouterr()
    text = " ".join(said.out.split())
    for part in COMMANDS[command]:
        assert part in text
    assert said.err == ""


def test_rules_are_no_options(capsys):
    assert run("train", CONFIG, "--help") == 0
    assert "optim.rules" not in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"clipjax {clipjax.__version__}\n"


def overridden(*args):
    return commands.override(tiny_emoji.config(), args, "clipjax train")


def test_overrides_reach_any_depth():
    made = overridden(
        *("--seed", "7", "--objective.0.weight", ".5", "--optim.schedule.warmup", "3", "--evals.0.every", "11"),
        *("--model.image.patch_dropout", "0.5", "--data.augment.flip", "True", "--optim.ema", "None"),
        *("--model.image.mean", ".1", ".2", ".3", "--data.spec=tsv:a.tsv", "--tokenizer.lowercase", "False"),
        *("--evals.0.data", "emoji"),
    )
    want = {
        "seed": 7, "objective.0.weight": 0.5, "optim.schedule.warmup": 3, "evals.0.every": 11, "model.image.patch_dropout": 0.5,
        "data.augment.flip": True, "optim.ema": None, "model.image.mean": (0.1, 0.2, 0.3), "data.spec": "tsv:a.tsv",
        "tokenizer.lowercase": False, "evals.0.data": "emoji",
    }  # fmt: skip
    changed = sorted(set(config.lines(made)) ^ set(config.lines(tiny_emoji.config())))
    assert {f"{name} = {value!r}" for name, value in want.items()} <= set(changed)
    assert len(changed) == 2 * len(want)
    assert made.optim.rules == config.RULES


def test_the_kind_of_a_schedule_changes_on_the_command_line_and_keeps_what_both_have():
    schedule = "--optim.schedule."
    for order in (("kind", "timescale", "warmup"), ("warmup", "timescale", "kind")):
        values = {"kind": "rsqrt", "timescale": "7", "warmup": "3"}
        options = [word for name in order for word in (f"{schedule}{name}", values[name])]
        assert overridden(*options).optim.schedule == config.Rsqrt(warmup=3, timescale=7, cooldown=0)
    assert overridden(f"{schedule}kind=constant").optim.schedule == config.Constant(warmup=10)
    assert overridden(f"{schedule}kind", "cosine") == tiny_emoji.config()
    # A cool-down of 8,000 steps needs a longer run than the file has: only what comes out at the end is checked.
    longer = overridden(f"{schedule}kind", "rsqrt", f"{schedule}cooldown", "8000", "--train.steps", "9000")
    assert longer.optim.schedule == config.Rsqrt(warmup=10, cooldown=8000)


def test_other_kinds_and_parts_on_the_command_line():
    assert overridden("--tokenizer.path", "P", "--tokenizer.kind", "file").tokenizer == config.TokenizerFile(path="P")
    assert overridden("--init.run", "RUN", "--init.state", "all").init == config.Init(run="RUN", state="all")
    for none in (("--evals", "none"), ("--evals=None",)):
        assert overridden("--train.steps", "20", *none).evals == ()
    assert overridden("--evals", "none") == dataclasses.replace(tiny_emoji.config(), evals=())


def test_every_closed_union_of_a_run_can_change_its_kind():
    from clipjax.config.override import KINDS

    def unions(cls: type, prefix: str = ""):
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated:
                yield prefix + name
            elif dataclasses.is_dataclass(hint):
                yield from unions(hint, f"{prefix}{name}.")

    assert set(unions(config.Run)) == KINDS.keys()


CONFIG_FIRST = {
    "CONFIG --workdir RUN": "CONFIG --workdir RUN",
    "--workdir RUN --train.steps 5 CONFIG": "CONFIG --workdir RUN --train.steps 5",
    "--workdir=RUN --train.steps=5 CONFIG": "CONFIG --workdir=RUN --train.steps=5",
    "--data.augment.flip True CONFIG --mesh.data -1": "CONFIG --data.augment.flip True --mesh.data -1",
    "--model.image.mean .1 .2 .3 CONFIG": "CONFIG --model.image.mean .1 .2 .3",
    "--model.image.mean .1 .2 .3 emoji_clip": "emoji_clip --model.image.mean .1 .2 .3",
    "--evals none -h emoji_clip": "emoji_clip --evals none -h",
    "--seed 3 emoji_clpi": "emoji_clpi --seed 3",
}


@pytest.mark.parametrize(("words", "expected"), CONFIG_FIRST.items())
def test_options_may_stand_before_the_config_file(words, expected):
    given, wanted = (text.replace("CONFIG", CONFIG).split() for text in (words, expected))
    for command in (["train"], ["plan"], ["bench", "step"], ["bench", "input"]):
        assert cli._config_first([*command, *given]) == ([*command, *wanted], True)
    assert cli._config_first(["plan", "--find-batch", CONFIG]) == (["plan", CONFIG, "--find-batch"], True)
    assert cli._config_first(["eval", "retrieval", "--data", "emoji", "RUN"])[0][2] == "--data"


@pytest.mark.parametrize("command", ["train", "plan", "bench step", "bench input"])
def test_every_command_with_fields_reads_its_config_from_anywhere(command, capsys):
    assert run(*command.split(), "--train.steps", "5", "--optim.schedule.warmup=5", CONFIG) == 2
    assert capsys.readouterr().err == "clipjax: optim.schedule.warmup = 5: must be less than train.steps = 5\n"
    assert run(*command.split(), "--train.steps", "5") == 2
    assert "CONFIG.py is needed" in capsys.readouterr().err
    assert run(*command.split(), "--train.stps", "5", CONFIG) == 2
    assert "--train.stps: there is no such field; the nearest is --train.steps" in capsys.readouterr().err
    assert run(*command.split(), "--optim.schedule.kind", "rsqrt", "--help", CONFIG) == 0
    shown = capsys.readouterr().out
    assert "--optim.schedule.kind {cosine,rsqrt,constant}" in shown
    assert "--optim.schedule.timescale INT" in shown
    assert "--tokenizer.kind {bpe,file}" in shown


@pytest.mark.parametrize("name", ["--train.batch_size", "--train.batch-size"])
def test_dashes_and_underscores_both_do(name):
    assert overridden(name, "8").train.batch_size == 8


def test_every_name_that_scripts_use_is_an_option():
    """Scripts outside the repository rely on them."""
    names = (
        "seed train.steps train.batch_size train.log_every train.checkpoint_every mesh.data mesh.fsdp mesh.tensor "
        "model.image.image_size model.image.patch_size model.text.length model.text.vocab_size model.remat optim.lr "
        "optim.mu_dtype data.spec"
    )
    now = {line.partition(" = ")[0]: line.partition(" = ")[2].strip("'") for line in config.lines(tiny_emoji.config())}
    for name in names.split():
        assert overridden(f"--{name}", now[name]) == tiny_emoji.config()


REFUSED = {
    "no command": ([], "required: COMMAND"),
    "no such command": (["trian"], "invalid choice: 'trian'"),
    "no config": (["train"], "CONFIG.py is needed"),
    "no workdir": (["train", CONFIG], "--workdir RUN is needed"),
    "no file": (["train", "nothing.py"], "CONFIG.py = 'nothing.py': is not a file"),
    "no packaged config": (["train", "nothing"], "NAME = 'nothing': there is no packaged config of this name"),
    "no SPEC": (["embed", "RUN", "--out", "a.npz"], "required: --data"),
    "no format": (["export", "RUN", "--to", "onnx", "--out", "a"], "invalid choice: 'onnx'"),
    "no library": (["import", "SRC", "--from", "timm", "--out", "a"], "invalid choice: 'timm'"),
    "no SRC": (
        ["import", "nothing", "--from", "open_clip", "--out", "a"],
        "SRC = 'nothing': is neither a folder nor a model of the Hugging Face hub",
    ),
    "stray option": (["eval", "retrieval", "RUN", "--data", "emoji", "--batch", "4"], "unrecognized arguments: --batch 4"),
    "misspelt option": (["embed", "RUN", "--data", "emoji", "--splt", "x", "--out", "a.npz"], "nearest of --splt is --split"),
    "no example": (["export", "RUN", "--to", "open_clip", "--out", "a", "--examples", "0"], "--examples: 0 must be positive"),
    "no RUN": (["eval", "retrieval", "nothing", "--data", "emoji"], "RUN = 'nothing': is not a workdir of `clipjax train`"),
    "no RUN to embed": (["embed", "nothing", "--data", "emoji", "--out", "a.npz"], "RUN = 'nothing': is not a workdir"),
    "no RUN to export": (["export", "nothing@3", "--to", "open_clip", "--out", "a"], "RUN = 'nothing@3': is not a workdir"),
    "no dataset": (["data", "inspect", "tfds:nothing"], "data.spec = 'tfds:nothing': not among the datasets"),
    "no spec": (["data", "inspect", "webdata:x"], "data.spec = 'webdata:x': must be emoji, tfds:"),
    "a folder as json": (["eval", "retrieval", "RUN", "--data", "emoji", "--json", "."], "--json: . is a folder: name a file"),
    "a folder as png": (["eval", "geometry", "RUN", "--data", "emoji", "--png", "."], "--png: . is a folder: name a file"),
    "a folder as npz": (["embed", "RUN", "--data", "emoji", "--out", "."], "--out: . is a folder: name a file"),
    "a folder as sheet": (["data", "inspect", "emoji", "--png", "."], "--png: . is a folder: name a file"),
    "in a file": (["embed", "RUN", "--data", "emoji", "--out", f"{CONFIG}/new/a.npz"], f"{CONFIG} is a file: name a folder"),
    "a file as workdir": (["train", CONFIG, "--workdir", CONFIG], f"--workdir: {CONFIG} is a file: name a folder"),
    "a file as export": (["export", "RUN", "--to", "open_clip", "--out", CONFIG], f"--out: {CONFIG} is a file: name a folder"),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_use_is_refused(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    said = capsys.readouterr()
    assert message in " ".join(said.err.split())
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["train", CONFIG, "--workdir", "new/run"],
        ["eval", "zeroshot", "RUN", "--data", "emoji", "--json", "new/a.json"],
        ["embed", "RUN", "--data", "emoji", "--out", "a.npz"],
        ["export", "RUN", "--to", "open_clip", "--out", "out"],
        ["data", "inspect", "emoji", "--png", "a.png"],
        ["data", "inspect", "emoji"],
    ],
)
def test_what_can_not_be_written_is_refused_before_any_work(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root, who may all
    assert run(*args) == 2
    said = capsys.readouterr()
    assert f"{tmp_path} can't be written to: name another folder" in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_file_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    assert run("data", "prepare", "emoji") == 2
    assert capsys.readouterr().err == f"clipjax: {tmp_path / 'file' / 'emoji'}: Not a directory\n"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commands, "load_config", full)
    assert run("train", CONFIG, "--workdir", tmp_path / "run") == 1
    assert capsys.readouterr().err == "clipjax: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CertainFailure("64 others can't be read"), 3, "64 others can't be read"),
        (FloatingPointError("loss = nan at step 5"), 3, "loss = nan at step 5"),
        (DamagedError("none of its checkpoints can be read"), 3, "none of its checkpoints can be read"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), 2, "a.json: No such file or directory"),
        (OSError(errno.EIO, "Input/output error", "a.png"), 1, "a.png: Input/output error"),  # a network disk may come back
        (OSError(errno.ESTALE, "Stale file handle", "a.png"), 1, "a.png: Stale file handle"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory.\n more"),
            3,
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Remedy: lower train.batch_size or",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 1, "RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_status_says_whether_the_same_command_can_succeed(error, status, message, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "load_config", fail)
    assert run("train", CONFIG, "--workdir", "run") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipjax: {message}")


@pytest.mark.slow
def test_too_many_images_that_cannot_be_read_fail_for_good(tmp_path, capsys):
    """Also where a worker process finds them."""
    rows = "".join(f"{i}.png\tnumber {i}\n" for i in range(16))
    (tmp_path / "pairs.tsv").write_text(f"filepath\ttitle\n{rows}")
    more = ["--evals", "none", "--data.worker_kind", "processes", "--model.text.vocab_size", "300"]
    assert run("train", CONFIG, "--workdir", tmp_path / "run", "--data.spec", f"tsv:{tmp_path}/pairs.tsv", *more) == 3
    assert "and 64 stand-ins are bad (can't be read: 65): the log has the reasons" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", CONFIG, "--workdir", "run"], "interrupted; the same command resumes from the newest checkpoint"),
        (["data", "inspect", "emoji"], "interrupted"),
    ],
)
def test_interrupted(args, message, capsys, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_config", stop)
    monkeypatch.setattr("clipjax.data.inspect.inspect", stop)
    assert run(*args) == 130
    assert capsys.readouterr().err == f"clipjax: {message}\n"


def test_a_warning_erases_the_live_line():
    """In a process of its own: pytest's logging keeps `main` from setting up any."""
    code = f"""
import io, logging, sys
from clipjax import cli, commands
from clipjax.train.progress import Progress
class Terminal(io.StringIO):
    isatty = lambda self: True
def train(*_):
    with Progress(10, screen) as progress:
        progress.update(1)
        logging.getLogger("clipjax.data").warning("an image can't be read")
        progress.update(10)
    raise FloatingPointError
commands.load_config, screen = train, Terminal()
assert cli.main(["train", {CONFIG!r}, "--workdir", "run"]) == 3
print(repr(screen.getvalue()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = ast.literal_eval(done.stdout)
    assert "\x1b[K\r\x1b[KWARNING: an image can't be read\n\rstep 10/10" in shown
    assert done.stderr == "clipjax: \n"


WRONG_FIELDS = {
    "--train.step 4": "--train.step: there is no such field; the nearest is --train.steps",
    "--batch_size=4": "--batch_size: there is no such field; the nearest is --train.batch_size",
    "--modell.image.image-size 16": "--modell.image.image-size: there is no such field; the nearest is --model.image.image_size",
    "--evals.1.every 4": "--evals.1.every: there is no such field; the nearest is --evals.0.every",
    "--optim.rules.0.lr 0": "rules are set in CONFIG.py",
    "stray": "Unrecognized options: stray",
    "--train.steps many": "--train.steps: invalid literal for int() with base 10: 'many'",
    "--train.steps 1.5": "--train.steps: invalid literal for int() with base 10: '1.5'",
    "--optim.lr fast": "--optim.lr: could not convert string to float: 'fast'",
    "--optim.kind sgd": "invalid choice 'sgd' for argument '--optim.kind'. Expected one of ('adamw', 'lamb', 'lion', ",
    "--data.augment.flip perhaps": "invalid choice 'perhaps' for argument '--data.augment.flip'",
    "--train.steps": "Missing value for argument '--train.steps'",
    "--tokenizer.kind file": "tokenizer.path: is missing: give --tokenizer.path too",
    "--tokenizer.kind fil": "--tokenizer.kind = 'fil': must be bpe, file; the nearest is file",
    "--optim.schedule.kind rsqr": "--optim.schedule.kind = 'rsqr': must be cosine, rsqrt, constant; the nearest is rsqrt",
    "--optim.schedule.kind rsqrt --optim.schedule.final 0.1": "--optim.schedule.final: there is no such field",
    "--optim.schedule.kind": "Missing value for argument '--optim.schedule.kind'",
    "--workdirs x": "--workdirs: there is no such field; the nearest is --workdir",
    "--evals few": "--evals = 'few': only none is possible; evaluations are chosen in CONFIG.py",
    "--evals none --evals.0.every 4": "--evals.0.every: there is no such field",
    "--evals none --train.best zeroshot_retrieval/image_retrieval_recall@1": "no evaluation of this run gives it",
    "--optim.lr -1": "optim.lr = -1.0: must be positive",
    "--model.image.image_size 4": "model.image.image_size = 4: must be at least model.image.patch_size = 8",
    "--model.text.embed-dim 16": "model.text.embed_dim = 16: must equal the image tower's embedding width 32",
    "--train.batch_size 12": "train.batch_size = 12: must be a multiple of the 8 devices of mesh axes data x fsdp; try 8 or 16",
    "--mesh.fsdp 3": "mesh.data = -1, mesh.fsdp = 3, mesh.tensor = 1: must multiply to the number of devices, 8",
    "--train.steps 10": "optim.schedule.warmup = 10: must be less than train.steps = 10",
    "--data.spec tsv:nothing.tsv": "evals.0.data = None: the run's own tsv:nothing.tsv has no splits: name other examples",
    "--evals none --data.spec tsv:nothing.tsv": "data.spec = 'tsv:nothing.tsv': nothing.tsv does not exist; check the path",
    "--data.split tset": "data.split = 'tset'",
}


@pytest.mark.parametrize("option", ["--optim.lr -1", "--model.image.image_size 4", "--train.steps 10", "--mesh.fsdp -1"])
def test_an_impossible_value_is_refused_in_one_line(option, capsys):
    assert run("train", CONFIG, *option.split(), "--workdir", "run") == 2
    line, rest = capsys.readouterr().err.split("\n")
    assert line.startswith("clipjax: ")
    assert line.partition(": ")[2] in {
        "optim.lr = -1.0: must be positive",
        "model.image.image_size = 4: must be at least model.image.patch_size = 8",
        "optim.schedule.warmup = 10: must be less than train.steps = 10",
        "mesh = {'data': -1, 'fsdp': -1, 'tensor': 1}: only one axis can be -1",
    }
    assert rest == ""


@pytest.mark.parametrize(("option", "message"), WRONG_FIELDS.items())
def test_what_can_not_be_is_refused_before_anything_is_built(option, message, capsys, tmp_path):
    workdir = tmp_path / "run"
    assert run("train", CONFIG, "--workdir", workdir, *option.split()) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("clipjax: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run = 1\n", "has no function config() that returns a clipjax.config.Run"),
        ("def config():\n    return {'seed': 1}\n", "= 'dict': must return a clipjax.config.Run"),
        (
            "from clipjax.config import ImageTower\ndef config():\n    return ImageTower(image_size=9)\n",
            "mine.py, line 3: model.image.image_size = 9: must be at least model.image.patch_size = 16",
        ),
        ("\ndef config(:\n", "mine.py, line 2: SyntaxError: invalid syntax"),
        ("import nothing\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nothing'"),
        (
            "from clipjax.config import Run\ndef config():\n    return Run(modle=1)\n",
            "mine.py, line 3: modle = 1: Run has no such field; the nearest is model\n",
        ),
        (
            "def config():\n    return of(1)\ndef of(n):\n    return {}[n]\n",
            "mine.py, line 4: KeyError: 1",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, message, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert run("train", file, "--workdir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}
    (tmp_path / "mine.txt").write_text(text)
    assert run("train", tmp_path / "mine.txt", "--workdir", tmp_path / "run") == 2
    assert "mine.txt': is not a Python file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *(f"eval {task} RUN --data emoji" for task in ("zeroshot", "retrieval", "geometry", "captioning")),
        *("embed RUN --data emoji --out a.npz", "caption RUN a.png", "export RUN --to open_clip --out out"),
    ],
)
def test_config_is_loaded_before_the_run(command, tmp_path, capsys, monkeypatch):
    """It may register what the run's config.json names."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from clipjax.config import Data, Run\nprint('loaded')\n\ndef config():\n    return Run(data=Data(spec='emoji'))\n"
    )
    assert run(*command.split(), "--config", "mine.py") == 2
    said = capsys.readouterr()
    assert said.out == "loaded\n"
    assert "RUN = 'RUN': is not a workdir" in said.err
    assert run(*command.split(), "--config", "none.py") == 2
    assert "CONFIG.py = 'none.py': is not a file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Six steps of emoji at 16 px, with checkpoints after three and six."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert run("train", CONFIG, "--workdir", path, *STEPS) == 0
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return clipjax.load(workdir)


@pytest.fixture(scope="module")
def embedded(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("embed") / "test.npz"
    assert run("embed", workdir, "--data", "emoji", "--out", path) == 0
    return dict(np.load(path))


def test_train_writes_a_workdir_that_rebuilds_the_run(workdir):
    assert {p.name for p in workdir.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json"}
    assert config.from_json((workdir / "config.json").read_text()) == overridden(*STEPS)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["task"]) for line in lines if "task" in line] == [(n, "zeroshot_retrieval") for n in (3, 6)]


def test_train_again_has_nothing_to_do(workdir, capsys):
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run("train", CONFIG, "--workdir", workdir, *STEPS) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "6 steps" in capsys.readouterr().err


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path, capsys):
    rows = ["filepath\ttitle"]
    for i in range(10):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\tnumber {i}")
    (tmp_path / "ten.tsv").write_text("\n".join(rows) + "\n")
    assert run("train", CONFIG, "--workdir", tmp_path / "run", "--data.spec", f"tsv:{tmp_path}/ten.tsv", "--evals", "none") == 2
    said = capsys.readouterr().err
    assert "train.batch_size = 16: is more than the 10 examples" in said
    assert "Traceback" not in said


def test_zeroshot(workdir, tmp_path, capsys, caplog):
    out = ("--json", tmp_path / "new" / "z.json", "--predictions", tmp_path / "p.csv")
    assert run("eval", "zeroshot", workdir, "--data", "emoji", "--templates", "plain", *out) == 0
    said = capsys.readouterr()
    result = json.loads((tmp_path / "new" / "z.json").read_text())
    assert json.loads(said.out) == result
    metrics = result.pop("metrics")
    assert result == {
        "dataset": "emoji/test",
        "model": "tiny",
        "pretrained": "step 6",
        "task": "zeroshot_classification",
        "language": "en",
    }
    assert metrics.keys() == {"acc1", "acc5", "mean_per_class_recall", "macro_f1"}
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        right = [row["label"] == row["class1"] for row in csv.DictReader(file)]
    assert len(right) == 363
    assert np.mean(right) == pytest.approx(metrics["acc1"], abs=1 / 363)  # but for prompts that are equal, truncated to 8 tokens
    assert "emoji/test: 3,789 classes, named by emoji/test, in 1 templates; the first prompt is" in said.err
    assert 0 <= metrics["acc1"] <= metrics["acc5"] < 1
    assert metrics["mean_per_class_recall"] == pytest.approx(metrics["acc1"])  # one image a name
    assert any("of 3789 prompts were truncated to 8 tokens" in record.getMessage() for record in caplog.records)


def test_zeroshot_with_files(workdir, tmp_path, capsys):
    (tmp_path / "templates.txt").write_text("{c}\nthe {c}\n")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    args = ["eval", "zeroshot", workdir, "--data", "emoji"]
    assert run(*args, "--templates", tmp_path / "templates.txt") == 0
    two = json.loads(capsys.readouterr().out)["metrics"]
    assert 0 <= two["acc1"] <= two["acc5"]
    assert run(*args, "--classnames", tmp_path / "names.txt") == 2
    assert "names 2 classes, but emoji/test has 3789" in capsys.readouterr().err
    assert run(*args, "--templates", "fancy") == 2
    assert (
        "templates = 'fancy': No such file or directory: use imagenet, simple, plain, a set's (caltech101,"
        in capsys.readouterr().err
    )
    assert run(*args, "--split", "tset") == 2
    assert "data.split = 'tset'" in capsys.readouterr().err


def test_retrieval_of_any_step(workdir, tmp_path, capsys):
    evaluations = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["metrics"] for line in evaluations if "task" in line}
    for name, step in ((f"{workdir}@3", 3), (f"{workdir}@6", 6), (str(workdir), 6)):
        assert run("eval", "retrieval", name, "--data", "emoji", "--json", tmp_path / "r.json") == 0
        said = capsys.readouterr()
        result = json.loads((tmp_path / "r.json").read_text())
        assert json.loads(said.out) == result
        metrics = result.pop("metrics")
        assert result == {
            "dataset": "emoji/test",
            "model": "tiny",
            "pretrained": f"step {step}",
            "task": "zeroshot_retrieval",
            "language": "en",
        }
        assert metrics == logged[step]  # what training saw, exactly
        ranks = {f"{what}_retrieval_{rank}_rank" for what in ("image", "text") for rank in ("mean", "median")}
        assert metrics.keys() == {*config.Retrieval.metrics, *ranks}
    assert run("eval", "retrieval", f"{workdir}@4", "--data", "emoji") == 2
    assert f"RUN = '{workdir}@4': has checkpoints of steps 3, 6 only" in capsys.readouterr().err


GEOMETRY = {
    "centroid_distance", "linear_separability", "relative_modality_gap", "uniformity_image", "uniformity_text",
    "cross_uniformity", "alignment", "rankme_image", "rankme_text", "scale", "bias",
}  # fmt: skip
CURVES = {"explained_variance_image", "explained_variance_text"}


def test_geometry(workdir, embedded, tmp_path, capsys, monkeypatch):
    from clipjax.evals.geometry import geometry

    monkeypatch.chdir(tmp_path)
    assert run("eval", "geometry", workdir, "--data", "emoji", "--json", tmp_path / "new" / "g.json") == 0
    said = capsys.readouterr()
    assert "image: " in said.err
    result = json.loads((tmp_path / "new" / "g.json").read_text())
    printed = json.loads(said.out)
    metrics = result.pop("metrics")
    assert {**printed.pop("metrics"), **{name: metrics[name] for name in CURVES}} == metrics
    assert printed == result
    assert result == {"dataset": "emoji/test", "model": "tiny", "pretrained": "step 6", "task": "geometry", "language": "en"}
    assert metrics.keys() >= GEOMETRY | CURVES
    assert metrics["bias"] is None
    assert metrics["scale"] == pytest.approx(np.exp(np.asarray(clipjax.load(workdir).params["log_scale"])))
    want = geometry(*(embedded[kind].astype(float) for kind in ("image", "text")))
    for name in want:
        assert metrics[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
    assert [len(metrics[name]) for name in sorted(CURVES)] == [32, 32]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["g.json", "g.png"]

    assert run("eval", "geometry", f"{workdir}@3", "--data", "emoji", "--split", "test") == 0
    assert json.loads(capsys.readouterr().out)["pretrained"] == "step 3"
    with Image.open("geometry-emoji-test.png") as opened:
        assert opened.format == "PNG"
    assert run("eval", "geometry", workdir, "--data", "emoji", "--json", "g.json", "--png", "mine.png") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "geometry-emoji-test.png", "mine.png", "new"]


def test_captioning_needs_a_captioning_head(workdir, capsys):
    assert run("eval", "captioning", workdir, "--data", "emoji") == 2
    said = capsys.readouterr()
    assert said.err == "clipjax: model.decoder = None: only a model with a captioning head generates captions\n"
    assert said.out == ""


def test_the_result_names_the_folder_and_is_printed_before_it_is_written(workdir, capsys, monkeypatch):
    from clipjax.evals import report

    def full(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a.json")

    monkeypatch.setattr(report, "write_json", full)
    monkeypatch.chdir(workdir)
    assert run("eval", "retrieval", ".", "--data", "emoji", "--json", workdir.parent / "a.json") == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["model"] == "tiny"
    assert said.err.endswith("clipjax: a.json: Permission denied\n")


def test_a_run_without_checkpoint(workdir, tmp_path, capsys):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert run("eval", "retrieval", tmp_path, "--data", "emoji") == 2
    assert f"RUN = '{tmp_path}': has no checkpoint yet" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_embed(embedded):
    assert embedded.keys() == {"image", "text", "key"}
    assert embedded["image"].shape == embedded["text"].shape == (363, 32)
    assert embedded["image"].dtype == embedded["text"].dtype == np.float32
    assert len(set(embedded["key"].tolist())) == 363
    for kind in ("image", "text"):
        np.testing.assert_allclose(np.linalg.norm(embedded[kind], axis=1), 1, rtol=1e-6)


def test_what_embed_writes_is_a_teacher(embedded, tmp_path):
    from clipjax.data.sources import open_source
    from clipjax.data.vectors import Vectors
    from clipjax.evals.embed import write_npz

    write_npz(tmp_path / "teacher.npz", embedded)
    teacher = Vectors(str(tmp_path / "teacher.npz"), open_source(config.Data(spec="emoji", split="test")))
    for i in (0, 17, 362):
        for kind in ("image", "text"):
            np.testing.assert_array_equal(teacher[i][f"teacher_{kind}"], embedded[kind][i])


def test_load_encodes_what_embed_does(model, embedded, workdir):
    from clipjax.data.faults import shown
    from clipjax.data.sources import open_source

    source = open_source(config.Data(spec="emoji", split="test"))
    chosen = [0, 1, 17, 362]
    images, records = [x.image for x in shown(source, chosen)], [source.text(i) for i in chosen]
    assert [record.key for record in records] == embedded["key"][chosen].tolist()
    image, text = model.encode_image(images), model.encode_text([record.captions[0] for record in records])
    for got, want in ((image, embedded["image"][chosen]), (text, embedded["text"][chosen])):
        assert (got.shape, got.dtype) == ((4, 32), np.float32)
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert (model.step, model.workdir, model.run) == (6, workdir, overridden(*STEPS))
    assert np.abs(image - clipjax.load(f"{workdir}@3").encode_image(images)).max() > 1e-4


def test_load_takes_images_of_any_kind(model, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 25, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    alpha = np.dstack([pixels, np.full((40, 25), 255, np.uint8)])
    alpha[:20, :, 3] = 0
    on_white = pixels.copy()
    on_white[:20] = 255
    grey = image.convert("L")
    same = model.encode_image([image, pixels, tmp_path / "a.png", str(tmp_path / "a.png")])
    np.testing.assert_array_equal(same, np.repeat(same[:1], 4, axis=0))
    seen = model.encode_image([Image.fromarray(alpha), on_white, grey, grey.convert("RGB")])
    np.testing.assert_array_equal(seen[::2], seen[1::2])
    assert np.abs(seen[0] - same[0]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm([*same, *seen], axis=1), 1, rtol=1e-6)


def test_load_encodes_any_number(model):
    """More than a batch (64 here), one, and none."""
    texts = [f"number {i}" for i in range(70)]
    all_of_them = model.encode_text(texts)
    assert all_of_them.shape == (70, 32)
    np.testing.assert_allclose(model.encode_text(texts[69:]), all_of_them[69:], atol=1e-6)
    assert model.encode_text([]).shape == (0, 32)
    assert model.encode_image([]).shape == (0, 32)
    long = "a long name " * 20
    np.testing.assert_array_equal(*model.encode_text([long, long + "cut"]))
    for encode in (model.encode_text, model.encode_image):
        with pytest.raises(TypeError, match="is one str; expected a list"):
            encode("picture.png")


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is not a workdir"):
        clipjax.load(tmp_path)


@pytest.mark.parametrize(("to", "weights"), [("open_clip", "open_clip_model.safetensors"), ("transformers", "model.safetensors")])
def test_export(workdir, model, tmp_path, capsys, to, weights):
    import safetensors.numpy

    assert run("export", f"{workdir}@3", "--to", to, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert f"{to}, bfloat16, step 3" in capsys.readouterr().out
    earlier = safetensors.numpy.load_file(tmp_path / "out" / weights)
    assert run("export", workdir, "--to", to, "--out", tmp_path / "out") == 0
    tensors = safetensors.numpy.load_file(tmp_path / "out" / weights)
    assert tensors["logit_scale"] == np.asarray(model.params["log_scale"]) != earlier["logit_scale"]
    mine = sum(x.size for x in jax.tree.leaves(model.params))
    assert sum(x.size for x in tensors.values()) == mine
    assert (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "out" / weights).unlink()
    assert run("export", workdir, "--to", to, "--out", tmp_path / "out") == 2
    assert "holds files, and no earlier export that could be replaced" in capsys.readouterr().err


def test_verification_without_torch_is_refused_before_anything_is_written(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("export", workdir, "--to", "transformers", "--out", tmp_path / "out", "--verify") == 2
    assert "clipjax: --verify: can't import torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_verification_says_what_it_does_not_judge(workdir, tmp_path, capsys, monkeypatch):
    from clipjax.export.compare import reference, verify
    from clipjax.export.compare.report import Compared, Report

    images = [
        Compared(0.25, None, "it crops otherwise"),
        *[Compared(1e-6, 1e-6)] * 31,
        Compared(0.5, None, "is white", "a window"),
    ]
    report = Report(32, 1e-6, 1e-6, 1e-6, images, [Compared(1e-6, 1e-6)] * 33)
    monkeypatch.setattr(reference, "require_packages", lambda to: None)
    monkeypatch.setattr(verify, "verify", lambda *_: report)
    assert run("export", workdir, "--to", "transformers", "--out", tmp_path / "out", "--verify") == 0
    said = capsys.readouterr().out
    assert "  not judged: 1 of 32 image files (3.1%), which differ by up to 2.5e-01: it crops otherwise\n" in said
    assert "  drawn: a window 5.0e-01, not judged: is white\n" in said
    assert said.count("not judged: ") == 2


def test_inspect(tmp_path, workdir, capsys):
    sheet = tmp_path / "sheet.png"
    words = ["--tokenizer", workdir / "tokenizer.json", "--length", 8]
    assert run("data", "inspect", "emoji", "--split", "test", "--png", sheet, *words) == 0
    said = capsys.readouterr().out
    rows = {line[:15].strip(): line[16:] for line in said.splitlines() if line[:1].strip()}
    assert rows["examples"] == "363"
    assert rows["width, pixels"].startswith("136 to 136")
    assert rows["unreadable"] == "0"
    assert rows["truncated"].endswith("at 8 tokens")
    assert 0 < float(rows["truncated"].split("%")[0]) < 100
    assert f"contact sheet: {sheet}" in said
    with Image.open(sheet) as opened:
        assert opened.format == "PNG"
        assert min(opened.size) > 1000


def test_inspect_of_images_that_none_can_read(tmp_path, capsys, monkeypatch):
    """In a folder whose path is longer than the name of a file may be."""
    folder = tmp_path / "a".ljust(120, "a") / "b".ljust(120, "b") / "c".ljust(60, "c")
    folder.mkdir(parents=True)
    (folder / "a.png").write_text("no image")
    (folder / "pairs.tsv").write_text("filepath\ttitle\na.png\ta fox\n")
    monkeypatch.chdir(tmp_path)
    assert run("data", "inspect", f"tsv:{folder}/pairs.tsv", "--json", tmp_path / "found.json") == 2
    said = capsys.readouterr()
    assert said.err.endswith("pairs.tsv': none of the 1 images looked at can be read\n")
    assert "a.png: UnidentifiedImageError" in said.out
    assert json.loads((tmp_path / "found.json").read_text())["unreadable"].keys() == {"a.png"}
    assert {path.name for path in tmp_path.iterdir()} == {folder.parents[1].name, "found.json"}
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    assert run("data", "inspect", f"tsv:{folder}/pairs.tsv") == 0
    (sheet,) = tmp_path.glob("*.png")
    assert sheet.name.endswith("pairs.tsv-train.png")


@pytest.mark.parametrize("args", [["configs"], ["configs", "emoji_clip"], ["train", "--help"], ["data", "inspect", "emoji"]])
def test_a_broken_pipe_ends_quietly(args, tmp_path):
    command = [sys.executable, "-m", "clipjax.cli", *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, **pipes
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait() == BROKEN_PIPE_STATUS or "--help" in args  # argparse does not tell that it could not write
    program.stderr.close()


def test_prepare_names_the_folder(capsys):
    assert run("data", "prepare", "emoji") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "features.json").exists()
