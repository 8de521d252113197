"""What the commands do that bring weights in and out, given their parsed arguments. As in commands.py, each imports what it
needs."""

import argparse
import sys
from typing import TYPE_CHECKING

import clipjax
from clipjax.commands import register
from clipjax.config import require

if TYPE_CHECKING:
    from clipjax.export.compare.verify_import import Comparison


def export(args: argparse.Namespace) -> int:
    """`clipjax export`: writes a run for open_clip or transformers; with --verify returns 1 if the results differ there."""
    from clipjax import distributed
    from clipjax.checkpoint import TOKENIZER
    from clipjax.export.compare import opening
    from clipjax.export.compare.reference import require_packages
    from clipjax.export.compare.verify import verify
    from clipjax.export.folder import export

    distributed.require_alone("clipjax export")
    if args.verify:
        require_packages(args.to)
    register(args)
    model = clipjax.load(args.workdir)
    run, tokenizer, clean = model.run, model.workdir / TOKENIZER, model.run.tokenizer.clean
    export(run.model, model.params, tokenizer, run.data.resize, args.out, args.to, clean, args.dtype)
    print(f"{args.out}: {args.to}, {args.dtype}, step {model.step} of {model.workdir}")
    if not args.verify:
        return 0
    from clipjax.data.faults import shown
    from clipjax.data.sources import open_source

    source = open_source(run.data)
    chosen = range(0, len(source), max(1, len(source) // args.examples))
    examples = [x for x in shown(source, chosen[: args.examples]) if x.record.captions]
    pairs = [x.image for x in examples], [x.record.captions[0] for x in examples], clean, source.captions(), args.dtype
    report = verify(args.out, args.to, run.model, model.params, tokenizer, run.data.resize, *pairs)
    return _judge(report, opening.notes([x.record.image for x in examples], run.model.image.image_size, run.data.resize))


def import_run(args: argparse.Namespace) -> int:
    """`clipjax import`: makes a workdir from a model of another library; with --verify returns 1 if its results differ there."""
    from clipjax import distributed
    from clipjax.export.compare import verify_import
    from clipjax.export.finetune import FINETUNE
    from clipjax.export.found import Options
    from clipjax.export.imported import import_run

    distributed.require_alone("clipjax import")
    options = Options(args.tokenizer, args.image_size)
    if args.verify:
        verify_import.require_comparable(args.origin, options)
    run, notes = import_run(args.source, args.out, args.origin, options)
    print(f"{args.out}: step 0, from {args.source}")
    if run.model.towers == "both":
        print(f"  to fine-tune it: clipjax train {args.out / FINETUNE} --workdir RUN")
    for note in notes:
        print(f"  not imported: {note}")
    if not args.verify:
        return 0
    model = clipjax.load(args.out)
    words = None if model.run.model.towers == "image" else model.tokenizer
    return _judge(*verify_import.verify_import(args.source, args.origin, options, model.run, model.params, words))


def _judge(report: "Comparison", notes: list[str]) -> int:
    """Prints a comparison. Returns 1 if it has failures."""
    print(f"verified in PyTorch on {report.examples} examples; largest differences, relative to an embedding's norm:")
    for figures in report.figures:
        print(f"  {figures}")
    for note in report.notes + notes:
        print(f"  not judged: {note}")
    for failure in report.failures:
        print(f"clipjax: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def average(args: argparse.Namespace) -> None:
    """`clipjax average`: makes a workdir whose weights are a weighted mean of those of several runs."""
    from clipjax import distributed
    from clipjax.export.average import average

    distributed.require_alone("clipjax average")
    register(args)
    runs, weights = args.runs, args.weights
    if args.alpha is not None:
        require(len(runs) == 2, "--alpha", args.alpha, f"is for two runs, not {len(runs)}; use --weights")
        weights = [1 - args.alpha, args.alpha]
    weights = [1 / len(runs)] * len(runs) if weights is None else weights
    found = average(runs, weights, args.out)
    print(f"{args.out}: step 0, the sum of")
    for (workdir, step), weight in zip(found, weights, strict=True):
        print(f"  {weight:g} times step {step} of {workdir}")
