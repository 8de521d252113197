"""What each command of `clipjax eval` does, given its parsed arguments."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import clipjax
from clipjax import config
from clipjax.arguments import writable_file
from clipjax.commands import dataset, first, load, say
from clipjax.config.data import dataset_name


def evaluating(kind: type[config.TrainingEvaluation]) -> Callable[[argparse.Namespace], None]:
    """A command that is one evaluation. Its options have the names of the fields that they give."""

    def command(args: argparse.Namespace) -> None:
        given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(kind)}
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}
        evaluate(args, kind(**values))

    return command


def eval_robustness(args: argparse.Namespace) -> None:
    """`clipjax eval robustness`: a run's accuracies under shifts, beside those of reference models that are as good without."""
    from clipjax.evals.robustness import robustness, table
    from clipjax.files import write_json

    found = robustness(args.results, args.reference, args.on)
    print(table(found))
    if args.json:
        write_json(args.json, dict(results=args.results, on=args.on, sets=[dataclasses.asdict(one) for one in found]))


def eval_relative(args: argparse.Namespace) -> None:
    """`clipjax eval relative`: how alike the spaces of two runs are, and whether images of one find texts of the other."""
    from clipjax.evals.relative import compare, spaces
    from clipjax.evals.report import write_json

    fields = dataset(args)
    clean = fields.pop("clean")
    fields["spec"] = fields.pop("data")
    models = load(args, args.a), clipjax.load(args.b)
    found = [spaces(model, fields, clean, args.anchors) for model in models]
    name = dataset_name(args.data, args.split)
    a, b = (f"{model.name}, step {model.step}" for model in models)
    metrics = compare(found[0], found[1], name)
    result = dict(dataset=name, anchors=args.anchors, a=a, b=b, task="relative_representations", metrics=metrics)
    say(json.dumps(result, indent=2, ensure_ascii=False))
    if args.json:
        write_json(args.json, result)


def evaluate(args: argparse.Namespace, wanted: config.TrainingEvaluation) -> None:
    """Runs an evaluation with the weights of a run: prints the metrics, and writes the files that options name."""
    from clipjax.evals.report import png_name, report, save_png, write_json
    from clipjax.evals.training import prepare

    default = args.json.with_suffix(".png") if args.json else f"{wanted.task}-" + png_name(f"{args.data}-{args.split}")
    png = (args.png or writable_file(str(default))) if "png" in args else None
    model = load(args)
    tokenizer = None if model.run.model.towers == "image" else model.tokenizer
    features = model.encoder.features
    of = "" if features == "embedding" else f", {features if isinstance(features, str) else 'head ' + ', '.join(features)}"
    evaluation = prepare(wanted, model.encoder, tokenizer, model.run.data)
    results: Any = evaluation.run(model.params)
    result = report(evaluation.dataset, model.name, f"step {model.step}{of}", wanted.task, results.metrics)
    numbers = {name: value for name, value in results.metrics.items() if not isinstance(value, list)}  # no curves
    say(json.dumps(result | {"metrics": numbers}, indent=2, ensure_ascii=False))
    if args.json:
        write_json(args.json, result)
    if png and first() and (image := results.draw(f"{model.name}, step {model.step}, on {evaluation.dataset}")):
        save_png(png, image)
        print(f"image: {png}", file=sys.stderr)
    if getattr(args, "predictions", None):
        results.predictions.write(args.predictions)


def eval_suite(args: argparse.Namespace) -> None:
    """`clipjax eval suite`: every set of a suite, its main figures and means over them."""
    from functools import partial
    from pathlib import Path

    from clipjax import files
    from clipjax.config.load import load_suite
    from clipjax.evals import results
    from clipjax.evals.encoder import Encoder
    from clipjax.evals.store import MOST, Store
    from clipjax.evals.suite import Weights, measure, run_suite
    from clipjax.evals.training import prepare

    suite, name = load_suite(args.suite), Path(args.suite).stem
    model = load(args)
    run = model.run
    kept = args.cache or (model.workdir / "embeddings" if files.scheme(model.workdir) is None else None)
    if kept is None and not args.no_cache:
        say(f"{args.workdir} is remote: name a folder of this machine with --cache, or embeddings are not kept", sys.stderr)
    store = None if args.no_cache or kept is None else Store(kept, args.cache_bytes or MOST)
    encoder = Encoder(run.model, model.mesh, run.train.eval_batch_size, store=store)
    tokenizer = None if run.model.towers == "image" else model.tokenizer
    ready = partial(prepare, encoder=encoder, tokenizer=tokenizer, own=run.data)
    found = measure(suite, args.root, ready, encoder, Weights(model.name, f"step {model.step}", model.params))
    out = args.out or model.workdir / results.SUITES / name
    run_suite(found, out, say)
    say(f"{out}: {results.LINES}, {results.TABLE}, {results.EXAMPLES}/", sys.stderr)


def eval_compare(args: argparse.Namespace) -> int:
    """`clipjax eval compare`: a run against another on the same queries. The status is 1 where the second is worse."""
    from clipjax.evals.comparison import compare, table
    from clipjax.files import write_json

    found = compare(args.a, args.b, args.metric)
    print(table(found, args.margin))
    worse = [difference for difference in found if difference.worse(args.margin)]
    if args.json:
        rows = [dataclasses.asdict(difference) | {"worse": difference in worse} for difference in found]
        write_json(args.json, dict(a=args.a, b=args.b, margin=args.margin, differences=rows))
    return int(bool(worse))
