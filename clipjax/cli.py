"""The command line: `clipjax COMMAND --help` tells each command's options, units and defaults.

Exit status: 0 fine, 1 failed (a non-finite loss, a verification that does not hold), 2 wrong use.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import clipjax
from clipjax import config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not train:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args, rest) if args.run is train else args.run(args)
    except config.ConfigError as error:
        print(f"clipjax: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"clipjax: {error}", file=sys.stderr)
        return 1


def load_config(path: str) -> config.Run:
    """What the `config()` of a Python file returns. Raises ConfigError where there is no such thing."""
    config.require(Path(path).is_file(), "CONFIG", path, "is not a file; those of clipjax are in configs/")
    spec = importlib.util.spec_from_file_location("clipjax_config", path)
    config.require(spec is not None, "CONFIG", path, "is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.require(hasattr(module, "config"), "CONFIG", path, "has no function config() that returns a clipjax.config.Run")
    run = module.config()
    config.require(isinstance(run, config.Run), f"config() of {path}", type(run).__name__, "must return a clipjax.config.Run")
    return run


def override(run: config.Run, args: Sequence[str], prog: str) -> config.Run:
    """`run` with `--any.field VALUE ...`. An unknown or ill-typed one exits with status 2, naming what comes near."""
    import tyro

    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(config.Run, default=run, args=list(args), prog=prog, config=options)


def train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.config is None or (args.help and not Path(args.config).is_file()):
        args.parser.print_help()
        return 0 if args.help else 2
    run = override(load_config(args.config), ["--help"] if args.help else rest, f"clipjax train {args.config} --workdir RUN")
    if args.workdir is None:
        args.parser.error("--workdir RUN is needed: where config, checkpoints and metrics go")
    from clipjax import build, sharding
    from clipjax.data.sources import open_source
    from clipjax.evals.training import make_evaluators
    from clipjax.train import loop

    mesh = sharding.make_mesh(run.mesh)
    sharding.check_batch(run, mesh)
    source = open_source(run.data)
    tokens = build.tokenizer(run, args.workdir, source)
    loop.train(run, args.workdir, build.batches(run, source, tokens), make_evaluators(run, mesh, tokens), mesh)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipjax", description=clipjax.__doc__)
    parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group: argparse._SubParsersAction, name: str, run: object, text: str, **kw: object) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=text, description=text, **kw)
        made.set_defaults(run=run, parser=made)
        return made

    p = command(commands, "train", train, "train a model, or go on where its workdir's newest checkpoint is", add_help=False)
    p.add_argument("config", nargs="?", metavar="CONFIG.py", help="a Python file with config() -> clipjax.config.Run")
    p.add_argument("--workdir", type=Path, metavar="RUN", help="folder for config, checkpoints, metrics and tokenizer")
    p.add_argument("--any.config.field", metavar="VALUE", help="override a field; `clipjax train CONFIG.py --help` lists them")
    p.add_argument("-h", "--help", action="store_true", help="this, or with CONFIG.py all its fields with their defaults")
    return parser


if __name__ == "__main__":
    sys.exit(main())
