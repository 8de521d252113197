"""The command line: `clipjax COMMAND --help` tells each command's options, units and defaults.

Exit status: 0 fine, 1 failed (a non-finite loss, a verification that does not hold), 2 wrong use.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import clipjax
from clipjax import config, environment
from clipjax.arguments import Help, positive, writable_file, writable_folder
from clipjax.bench import BATCHES, CPU_DEVICES, LOSSES
from clipjax.config.load import load_config, override

if TYPE_CHECKING:
    from clipjax.evals.encoder import Metrics
    from clipjax.evals.geometry import Geometry
    from clipjax.evals.loaded import Loaded
    from clipjax.evals.retrieval import Retrieval
    from clipjax.evals.zeroshot import Zeroshot

SPEC = "emoji, tfds:NAME[/CONFIG][:VERSION], or tsv:FILE with columns filepath and title"
RUN = "a workdir of `clipjax train`: its newest checkpoint, or RUN@STEP"


def program() -> None:
    """The entry point: starts itself once more where the environment has yet to tell libraries something, then runs `main`."""
    if sys.platform == "linux" and not environment.MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, environment.wanted() | os.environ)
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args, rest = _parser().parse_known_args(argv)
    args.rest = rest
    if rest and args.run is not train:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_ToStderr()])
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant so, as of a folder that is only read
    try:
        return args.run(args) or 0
    except (config.ConfigError, argparse.ArgumentTypeError) as error:
        status, message = 2, error
    except OSError as error:  # one that names a file is the user's to mend
        status, message = (2, f"{error.filename}: {error.strerror}") if error.filename else (1, error)
    except FloatingPointError as error:
        status, message = 1, error
    except KeyboardInterrupt:
        again = "; the same command goes on from the newest checkpoint" if args.run is train else ""
        status, message = 130, f"interrupted{again}"
    print(f"clipjax: {message}", file=sys.stderr)
    return status


class _ToStderr(logging.Handler):
    """To what is sys.stderr at the time: the progress line stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def train(args: argparse.Namespace) -> None:
    """`clipjax train`: from a configuration to a finished run in its workdir."""
    if args.config is None:
        if args.help:
            args.parser.print_help()
            return
        args.parser.error("CONFIG.py is needed")
    rest = ["--help"] if args.help else args.rest
    run = override(load_config(args.config), rest, f"clipjax train {args.config} --workdir RUN")
    if args.workdir is None:
        args.parser.error("--workdir RUN is needed: the folder for config, checkpoints, metrics and tokenizer")
    from clipjax import build, sharding
    from clipjax.data.sources import open_source
    from clipjax.evals.training import make_evaluators
    from clipjax.train import loop, resume

    mesh = sharding.make_mesh(run.mesh)
    resume.check(run, args.workdir, mesh)
    source = open_source(run.data)
    taught = build.teacher(run, source)
    tokens = build.tokenizer(run, args.workdir, source)
    batches = build.batches(run, source, tokens, taught)
    loop.train(run, args.workdir, batches, make_evaluators(run, mesh, tokens, args.workdir), mesh)


def eval_zeroshot(args: argparse.Namespace) -> None:
    """`clipjax eval zeroshot`: accuracies of a run as a classifier."""
    from clipjax.evals.inputs import eval_data
    from clipjax.evals.zeroshot import Zeroshot

    model = clipjax.load(args.workdir)
    data = eval_data(model.run, args.data, args.split)
    evaluation = Zeroshot.prepare(model.encoder, model.tokenizer, data, args.templates, args.classnames)
    _report(args, model, evaluation, evaluation.run(model.params))


def eval_retrieval(args: argparse.Namespace) -> None:
    """`clipjax eval retrieval`: recalls of a run in both directions."""
    from clipjax.evals.inputs import eval_data
    from clipjax.evals.retrieval import Retrieval

    model = clipjax.load(args.workdir)
    evaluation = Retrieval.prepare(model.encoder, model.tokenizer, eval_data(model.run, args.data, args.split))
    _report(args, model, evaluation, evaluation.run(model.params))


def eval_geometry(args: argparse.Namespace) -> None:
    """`clipjax eval geometry`: the gap between a run's pictures and texts, in figures and in a picture."""
    from clipjax.evals.geometry import Geometry
    from clipjax.evals.geometry_plot import file_name, plot
    from clipjax.evals.inputs import eval_data

    beside = args.json.with_suffix(".png") if args.json else "geometry-" + file_name(f"{args.data}-{args.split}")
    picture = args.png or writable_file(str(beside))
    model = clipjax.load(args.workdir)
    evaluation = Geometry.prepare(model.encoder, model.tokenizer, eval_data(model.run, args.data, args.split))
    found = evaluation.measure(model.params)
    _report(args, model, evaluation, found.metrics)
    plot(picture, found, f"{model.workdir.resolve().name}, step {model.step}, on {evaluation.dataset}")
    print(f"picture: {picture}", file=sys.stderr)


def _report(args: argparse.Namespace, model: "Loaded", evaluation: "Zeroshot | Retrieval | Geometry", metrics: "Metrics") -> None:
    from clipjax.evals.report import report, write_json

    result = report(evaluation.dataset, model.workdir.resolve().name, f"step {model.step}", evaluation.task, metrics)
    figures = {name: value for name, value in metrics.items() if not isinstance(value, list)}  # a curve is for the file
    print(json.dumps(result | {"metrics": figures}, indent=2, ensure_ascii=False))
    if args.json:
        write_json(args.json, result)


def embed(args: argparse.Namespace) -> None:
    """`clipjax embed`: a dataset's unit vectors in a file."""
    from clipjax.evals.embed import embed, write_npz
    from clipjax.evals.inputs import eval_data

    model = clipjax.load(args.workdir)
    arrays = embed(model.encoder, model.params, model.tokenizer, eval_data(model.run, args.data, args.split))
    write_npz(args.out, arrays)
    print(f"{args.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


def export(args: argparse.Namespace) -> int:
    """`clipjax export`: a run as a folder of open_clip's or transformers', and whether it does the same there."""
    from clipjax.checkpoint import TOKENIZER
    from clipjax.export.folder import export
    from clipjax.export.verify import require_packages, verify

    if args.verify:
        require_packages(args.to)
    model = clipjax.load(args.workdir)
    run, tokenizer = model.run, model.workdir / TOKENIZER
    export(run.model, model.params, tokenizer, run.data.resize, args.out, args.to)
    print(f"{args.out}: {args.to}, step {model.step} of {model.workdir}")
    if not args.verify:
        return 0
    from PIL import Image

    from clipjax.data.sources import open_source

    source = open_source(run.data)
    chosen = range(0, len(source), max(1, len(source) // args.examples))
    examples = [source[i] for i in chosen[: args.examples]]
    pictures, texts = [Image.fromarray(x.image) for x in examples], [x.captions[0] for x in examples]
    report = verify(args.out, args.to, run.model, model.params, tokenizer, run.data.resize, pictures, texts)
    print(f"verified in PyTorch on {report.examples} examples; largest differences, of an embedding's norm:")
    print(f"  same pixels and ids: image {report.image:.1e}, text {report.text:.1e}; logits {report.logits:.1e}")
    print(f"  from picture and string: image {report.picture:.1e}, text {report.caption:.1e}")
    for note in report.notes:
        print(f"  not judged: {note}")
    for failure in report.failures:
        print(f"clipjax: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def bench_loss(args: argparse.Namespace) -> None:
    """`clipjax bench loss`: what streaming costs and saves."""
    from clipjax.bench.loss import run

    run(args)


def data_prepare(args: argparse.Namespace) -> None:
    """`clipjax data prepare`: builds a dataset, unless it is there, and tells its folder."""
    from clipjax.data.emoji import prepare_emoji
    from clipjax.data.tfds_source import data_dir

    print(prepare_emoji(data_dir()))


def data_inspect(args: argparse.Namespace) -> None:
    """`clipjax data inspect`: figures to read and pictures to look at."""
    from clipjax.data.inspect import describe, inspect
    from clipjax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer, args.length) if args.tokenizer else None
    sheet = args.png or writable_file(f"{args.spec.replace(':', '-').replace('/', '-')}-{args.split}.png")
    print(describe(inspect(config.Data(spec=args.spec, split=args.split), tokenizer, sheet, length=args.length)))
    print(f"contact sheet: {sheet}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipjax", description=clipjax.__doc__)
    parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def group(name: str, text: str) -> argparse._SubParsersAction:
        return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="WHAT")

    def command(under: argparse._SubParsersAction, name: str, run: object, text: str, **kw: bool) -> argparse.ArgumentParser:
        made = under.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False, **kw)
        made.set_defaults(run=run, parser=made)
        return made

    def of_run(p: argparse.ArgumentParser, split: str = "test") -> None:
        p.add_argument("workdir", metavar="RUN", help=RUN)
        p.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
        p.add_argument("--split", default=split, help="part of the dataset")

    p = command(commands, "train", train, "train a model, or go on from its workdir's newest checkpoint", add_help=False)
    p.add_argument("config", nargs="?", metavar="CONFIG.py", help="a Python file with config() -> clipjax.config.Run")
    p.add_argument("--workdir", type=writable_folder, metavar="RUN", help="folder for config, checkpoints, metrics and tokenizer")
    p.add_argument("-h", "--help", action="store_true", help="this; after CONFIG.py all its fields, each of which is an option")

    evals = group("eval", "evaluate a run")
    p = command(evals, "zeroshot", eval_zeroshot, "zero-shot classification: acc1, acc5, mean-per-class recall")
    of_run(p)
    p.add_argument("--classnames", metavar="FILE", help="one name a line, in the order of the labels; else the dataset's own")
    templates = "simple (7 prompts a class), imagenet (80), plain (the name alone), or a file with one {c} a line"
    p.add_argument("--templates", default="simple", metavar="NAME|FILE", help=templates)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result here")
    p = command(evals, "retrieval", eval_retrieval, "image-text retrieval: recall at 1, 5 and 10 in both directions")
    of_run(p)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result here")

    p = command(evals, "geometry", eval_geometry, "the contrastive gap and its kin: distances, separability, uniformity, RankMe")
    of_run(p)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result, with curves of explained variance")
    picture = "both clouds and their spectra; else beside --json, or geometry-SPEC-SPLIT.png in this folder"
    p.add_argument("--png", type=writable_file, metavar="OUT", help=picture)

    p = command(commands, "embed", embed, "write a dataset's embeddings: arrays image, text and key, float32 unit vectors")
    of_run(p)
    p.add_argument("--out", type=writable_file, required=True, metavar="FILE.npz", help="where to write")

    p = command(commands, "export", export, "write a folder that open_clip or transformers loads as it is")
    p.add_argument("workdir", metavar="RUN", help=RUN)
    p.add_argument("--to", required=True, choices=("open_clip", "transformers"), help="the library that shall load it")
    p.add_argument("--out", type=writable_folder, required=True, metavar="DIR", help="a new folder, or that of an earlier export")
    p.add_argument("--verify", action="store_true", help="load it in PyTorch and compare embeddings of the run's own examples")
    p.add_argument("--examples", type=positive, default=32, help="how many --verify compares")

    data = group("data", "prepare or look at a dataset")
    p = command(data, "prepare", data_prepare, "build a dataset that clipjax makes itself, in TFDS's folder")
    p.add_argument("name", choices=("emoji",), help="emoji: from the system's colour-emoji font")
    p = command(data, "inspect", data_inspect, "count, sizes, captions, truncation, and a contact sheet")
    p.add_argument("spec", metavar="SPEC", help=SPEC)
    p.add_argument("--split", default="train", help="part of the dataset")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; else a BPE is trained on the captions")
    p.add_argument("--length", type=positive, default=77, help="tokens a caption may have, for the truncation statistics")
    p.add_argument("--png", type=writable_file, metavar="OUT", help="the contact sheet; else SPEC-SPLIT.png in this folder")

    benches = group("bench", "measure")
    p = command(benches, "loss", bench_loss, "the streamed losses beside dense ones: memory, FLOPs, collectives and time")
    p.add_argument("--loss", nargs="+", choices=LOSSES, default=LOSSES, help="which")
    p.add_argument("--batch", nargs="+", type=positive, metavar="N", default=BATCHES, help="global batch sizes, in pairs")
    p.add_argument("--width", type=positive, default=512, help="of the embeddings")
    p.add_argument("--travel", choices=("ring", "gather", "auto"), default="auto", help="how columns travel; auto: by size")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--devices", type=positive, metavar="N", help=f"use N; else all, or {CPU_DEVICES} simulated on a CPU")
    where.add_argument("--topology", metavar="T", help="compile for TPUs that need not be there, as v5e:16x16; times nothing")
    p.add_argument("--turns", type=positive, default=7, help="timed runs of each form, in turn")
    p.add_argument("--patience", type=positive, default=15, metavar="SECONDS", help="a batch whose turns take longer isn't timed")
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write all figures here")
    return parser


if __name__ == "__main__":
    program()
