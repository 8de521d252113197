"""What a command of the command line is, and the arguments that several commands share."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from clipjax import config
from clipjax.arguments import names, writable_file


@dataclass(frozen=True)
class Argument:
    """An argument or an option, and the keywords of `ArgumentParser.add_argument` for it."""

    name: str
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command. A name of two words is one of a group, as `eval zeroshot`."""

    name: str
    run: Callable[[argparse.Namespace], int | None]  # returns the exit status; None is 0
    help: str
    arguments: tuple[Argument | tuple[Argument, ...], ...]  # those in a tuple of their own exclude each other
    fields: bool  # whether it takes CONFIG.py|NAME, and every field of that configuration as an option


def command(
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    *arguments: Argument | tuple[Argument, ...],
    fields: bool = False,
) -> Command:
    return Command(name, run, text, arguments, fields)


def argument(name: str, metavar: str | None, text: str, kind: Callable[[str], object] | None = None, **more: object) -> Argument:
    keywords = {"metavar": metavar, "type": kind, "help": text}
    return Argument(name, {key: value for key, value in keywords.items() if value is not None} | more)


def json_out(what: str) -> Argument:
    return argument("--json", "OUT", f"also write {what} to this file", writable_file)


SPEC = "emoji, tfds:NAME[/CONFIG][:VERSION], wds:SHARDS, parquet:FILES, csv:FILES, tsv:FILES, folder:DIR or karpathy:FILE"


CLEAN = get_args(config.Clean)
FIELDS = (
    argument("--image-field", "NAME", "the image's feature, column or suffix, or a path in it, as image.bytes"),
    argument("--text-field", "NAME", "the captions' feature, column or suffix, or a path in it, as json.caption"),
    argument("--label-field", "NAME", "the class's feature, column or suffix, or a path in it"),
)
RUN = (
    argument("workdir", "RUN", "a workdir of `clipjax train`, local or on gs:// or s3://: its newest checkpoint, or RUN@STEP"),
    argument("--config", "CONFIG.py", "load this config file first: it registers losses or evaluations that the run uses"),
)
DATASET = (
    argument("--data", "SPEC", SPEC, required=True),
    argument("--split", None, "split of the dataset, or a share of it, as train#95-100", default="test"),
    *FIELDS,
    argument("--clean", None, "what is done to texts, prompts too, before they are tokens; else as in training", choices=CLEAN),
)
DATA = (*RUN, *DATASET)
VECTORS = (
    argument("--head", "NAME", "take this head's vectors, not embeddings; of several, as a,b, the mean of their cosines", names),
    argument("--features", None, "embeddings, or before the projection", choices=("embedding", "tower"), default="embedding"),
)
