"""What each command does, given its parsed arguments. The exit status is what it returns, or 0.

Each command imports the heavy modules that it needs: `clipjax --help` loads no JAX.
"""

import argparse
import zlib
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import clipjax
from clipjax import config
from clipjax.config.load import load_config
from clipjax.config.override import override
from clipjax.config.packaged import packaged_config, packaged_configs, summary

if TYPE_CHECKING:
    from clipjax.evals.loaded import LoadedRun


def wrong_use(args: argparse.Namespace, message: str) -> NoReturn:
    """Prints the command's usage and the message, and exits with 2."""
    parser: argparse.ArgumentParser = args.parser
    parser.error(message)


def _configured(args: argparse.Namespace, needed: str = "") -> config.Run | None:
    """The run of CONFIG.py|NAME, with the options that name its fields. None if the user asked for --help without a config."""
    if args.config is None:
        if not args.help:
            wrong_use(args, "CONFIG.py is needed, or a NAME that `clipjax configs` lists")
        args.parser.print_help()
        return None
    rest = [*args.rest, "--help"] if args.help else args.rest
    prog = f"{args.parser.prog} {args.config} {needed}".rstrip()
    return override(load_config(args.config), rest, prog, args.own_options)


def configs(args: argparse.Namespace) -> None:
    """`clipjax configs`: the packaged configs, one line each, or the text of one."""
    if args.name is not None:
        print(packaged_config(args.name).read_text(encoding="utf-8"), end="")
        return
    files = packaged_configs()
    width = max(map(len, files))
    for name, path in files.items():
        print(f"{name:{width}}  {summary(path)}")


def train(args: argparse.Namespace) -> None:
    """`clipjax train`: from a configuration to a finished run in its workdir."""
    if (run := _configured(args, "--workdir RUN")) is None:
        return
    if args.workdir is None:
        wrong_use(args, "--workdir RUN is needed: the folder for config, checkpoints, metrics and tokenizer")
    profile, steps = args.profile or range(0), run.train.steps
    remedy = f"must begin before train.steps = {steps}"
    config.require(profile.start < steps, "--profile", f"{profile.start}:{profile.stop}", remedy)
    if run.train.wandb:
        from clipjax.metrics.wandb_board import require_package

        require_package(run.train.wandb)
    from clipjax import build, distributed, environment, sharding
    from clipjax.data.sources import open_source
    from clipjax.evals.embedded import agreement
    from clipjax.evals.training import make_evaluators
    from clipjax.train import loop
    from clipjax.train.same_data import recognized
    from clipjax.train.workdir import open_workdir

    if profile:
        environment.leave_out_libtpu()
    distributed.start()
    distributed.agree("the configuration's checksum", zlib.crc32(config.to_json(run).encode()))
    environment.keep_programs()
    mesh = sharding.make_mesh(run.mesh)
    with open_workdir(run, args.workdir, mesh) as workdir:
        with distributed.first_process_first("dataset"):  # the first process builds it, if it is missing
            source = open_source(run.data)
        distributed.agree("the number of examples", len(source))
        workdir = recognized(workdir, source, args.accept_new_data)
        teacher, embedded, labels = build.teacher(run, source), build.embedded(run, source), build.labels(run, source)
        tokenizer = build.tokenizer(run, workdir, source)
        batches = build.batches(run, source, tokenizer, teacher=teacher, embedded=embedded, labels=labels)
        evaluators = make_evaluators(run, mesh, tokenizer, workdir.path)
        check = dict(check=agreement(run, mesh, tokenizer, source, embedded)) if embedded else {}
        loop.train(run, workdir, batches, evaluators, mesh, source, range(profile.start, min(profile.stop, steps)), **check)


def load(args: argparse.Namespace, name: str | None = None) -> "LoadedRun":
    """The run to evaluate, on the devices of all processes. `name`, None: the one that the command is about."""
    from clipjax import distributed, environment

    register(args)
    distributed.start()
    environment.keep_programs()
    features: Any = getattr(args, "head", None) or getattr(args, "features", "embedding")
    return clipjax.load(name or args.workdir, features=features)


def register(args: argparse.Namespace) -> None:
    """Executes the file of --config, because it may register losses or evaluations that the run's configuration names."""
    if args.config:
        load_config(args.config)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints, in the first process only."""
    if first():
        print(text, file=file)


def first() -> bool:
    """Whether this is the first process."""
    import jax

    return jax.process_index() == 0


def dataset(args: argparse.Namespace) -> dict[str, Any]:
    """What to evaluate on, as the fields of a TrainingEvaluation."""
    fields = dict(image_field=args.image_field, text_field=args.text_field, label_field=args.label_field)
    return dict(data=args.data, split=args.split, clean=args.clean, **fields)


def embed(args: argparse.Namespace) -> None:
    """`clipjax embed`: writes the embeddings of a dataset."""
    from clipjax.evals.embed import embed, write_npz
    from clipjax.evals.inputs import eval_data

    model = load(args)
    fields = dataset(args)
    clean = fields.pop("clean")
    tokenizer = None if model.run.model.towers == "image" else model.tokenizer.cleaning(clean)
    data = eval_data(model.run.data, fields.pop("data"), **fields)
    arrays = embed(model.encoder, model.params, tokenizer, data)
    write_npz(args.out, arrays)
    say(f"{args.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


def cluster(args: argparse.Namespace) -> None:
    """`clipjax cluster`: writes the labels of a file of embeddings."""
    from clipjax.evals.embed import write_npz
    from clipjax.evals.kmeans import cluster

    found, keys = cluster(str(args.embeddings), args.classes, args.nearest, args.side, args.seed)
    write_npz(args.out, {"key": keys, "label": found.label, "centroid": found.centroid})
    used = len({*found.label[:, 0].tolist()})
    counts = f"{len(keys):,} rows in {used:,} of {args.classes:,} clusters after {found.rounds} rounds"
    say(f"{args.out}: {counts}; mean cosine with the centroid {found.cosine:.3f}")


def caption(args: argparse.Namespace) -> None:
    """`clipjax caption`: generates captions of image files, and of the images of datasets."""
    from clipjax.evals.pictures import pictures
    from clipjax.evals.report import write_json
    from clipjax.generate import GREEDY, Beam, Sample

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    sampling, search = given("temperature", "top_k", "top_p", "seed"), given("beams", "alpha")
    if sampling and search:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sampling)
        wrong_use(args, f"{names}: only for sampled captions; --beams and --alpha are for beam search")
    decoding = Sample(**sampling) if sampling else Beam(**search) if search else GREEDY
    model = load(args)
    names, images = pictures(model.run, args.images, args.split, args.image_field)
    pairs = zip(names, model.captions(images, decoding), strict=True)
    rows = [dict(image=image, caption=text, logprob=logprob) for image, (text, logprob) in pairs]
    for row in rows:
        say(f"{row['image']}: {row['caption']}")
    if args.json:
        write_json(args.json, rows)


def report(args: argparse.Namespace) -> None:
    """`clipjax report`: runs side by side, on one page that opens offline."""
    from clipjax.files import write_atomic
    from clipjax.report.page import make_page

    register(args)
    if args.pictures:
        from clipjax import distributed, environment

        distributed.start()
        environment.keep_programs()
    page = make_page(args.folders, args.data, args.split, args.reference, load=args.pictures)
    if not args.pictures or first():  # to ask which process this is takes the devices
        with write_atomic(args.out) as part:
            part.write_text(page, encoding="utf-8")
        print(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB")


def plan(args: argparse.Namespace) -> int:
    """`clipjax plan`: memory, traffic and estimated time of a run on chips that need not be present."""
    if (run := _configured(args, "--topology T")) is None:
        return 0
    from clipjax.plan import command

    return command.run(args, run)


def bench_loss(args: argparse.Namespace) -> None:
    """`clipjax bench loss`: the streamed losses beside dense ones."""
    from clipjax.bench.loss import run

    run(args)


def bench_step(args: argparse.Namespace) -> int:
    """`clipjax bench step`: how long a run's train step takes on the devices of this machine."""
    if (run := _configured(args)) is None:
        return 0
    from clipjax import distributed, environment
    from clipjax.bench import step

    distributed.start()
    environment.keep_programs()
    return step.run(args, run)


def bench_input(args: argparse.Namespace) -> None:
    """`clipjax bench input`: how fast this machine makes a run's batches."""
    if (run := _configured(args)) is None:
        return
    from clipjax.bench import input as reading

    reading.run(args, run)
