"""The commands of the command line and their options, as data. cli.py makes a parser of them, commands.py holds what they do."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from clipjax import commands, config, data_commands, weight_commands
from clipjax.arguments import local, local_folder, place, positive, step_range, writable_file, writable_folder
from clipjax.bench import BATCHES, CPU_DEVICES, LOSSES


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


def _command(
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    *arguments: Argument | tuple[Argument, ...],
    fields: bool = False,
) -> Command:
    return Command(name, run, text, arguments, fields)


def _argument(name: str, metavar: str | None, text: str, kind: Callable[[str], object] | None = None, **more: object) -> Argument:
    keywords = {"metavar": metavar, "type": kind, "help": text}
    return Argument(name, {key: value for key, value in keywords.items() if value is not None} | more)


def _json(what: str) -> Argument:
    return _argument("--json", "OUT", f"also write {what} to this file", writable_file)


SPEC = "emoji, tfds:NAME[/CONFIG][:VERSION], wds:SHARDS, parquet:FILES, csv:FILES, tsv:FILES or folder:DIR"
ORIGINS = ("open_clip", "transformers", "big_vision")
CLEAN = get_args(config.Clean)
FIELDS = (
    _argument("--image-field", "NAME", "the image's feature, column or suffix, or a path in it, as image.bytes"),
    _argument("--text-field", "NAME", "the captions' feature, column or suffix, or a path in it, as json.caption"),
    _argument("--label-field", "NAME", "the class's feature, column or suffix, or a path in it"),
)
RUN = (
    _argument("workdir", "RUN", "a workdir of `clipjax train`, local or on gs:// or s3://: its newest checkpoint, or RUN@STEP"),
    _argument("--config", "CONFIG.py", "load this config file first: it registers losses or evaluations that the run uses"),
)
DATA = (
    *RUN,
    _argument("--data", "SPEC", SPEC, required=True),
    _argument("--split", None, "split of the dataset, or a share of it, as train#95-100", default="test"),
    *FIELDS,
    _argument("--clean", None, "what is done to texts, prompts too, before they are tokens; else as in training", choices=CLEAN),
)

GROUPS = {
    "eval": "evaluate a run",
    "data": "prepare a dataset, or look at one",
    "bench": "measure time, memory and throughput",
}
COMMANDS = (
    _command(
        "train",
        commands.train,
        "train a model, or resume it from the newest checkpoint of its workdir",
        _argument("--workdir", "RUN", "folder of the run, local or on gs:// or s3://", writable_folder),
        _argument(
            "--profile",
            "FROM:TO",
            "trace the steps from FROM finished ones to TO, on all processes, into RUN/profile, for TensorBoard or Perfetto",
            step_range,
        ),
        _argument(
            "--accept-new-data", None, "resume also with other data than before (other keys or captions)", action="store_true"
        ),
        fields=True,
    ),
    _command(
        "configs",
        commands.configs,
        "list the configs that come with clipjax, or print one to start from",
        _argument("name", "NAME", "print this one", nargs="?"),
    ),
    _command(
        "plan",
        commands.plan,
        "compile a run's train step for devices that need not be present: memory, sharding, collectives, FLOPs, estimated time",
        _argument(
            "--topology",
            "T",
            "TPUs, as v5e:16x16; GPUs, as h100:8, or h100:2x8 on 2 hosts; cpu:N, simulated; else this machine's devices",
        ),
        _argument("--slices", "N", "number of such slices, joined by the data-centre network", positive, default=1),
        _argument(
            "--find-batch",
            None,
            "also find the largest batch that fits, a power of two, with the configured train.micro_batches",
            action="store_true",
        ),
        _json("all figures"),
        fields=True,
    ),
    _command(
        "eval zeroshot",
        commands.eval_zeroshot,
        "zero-shot classification: acc1, acc5, mean-per-class recall",
        *DATA,
        _argument("--classnames", "FILE", "one name a line, in the order of the labels; else the dataset's own names"),
        _argument(
            "--templates",
            "NAME|FILE",
            "simple (7 prompts a class), imagenet (80), plain (the name alone), or a file with one {c} a line",
            default="simple",
        ),
        _json("the result"),
    ),
    _command(
        "eval retrieval",
        commands.eval_retrieval,
        "image-text retrieval: recall at 1, 5 and 10 in both directions",
        *DATA,
        _json("the result"),
    ),
    _command(
        "eval geometry",
        commands.eval_geometry,
        "the contrastive gap: distances, separability, uniformity, alignment, RankMe",
        *DATA,
        _json("the result, with curves of explained variance,"),
        _argument(
            "--png",
            "OUT",
            "plot of the embeddings and their spectra; else beside --json, or geometry-SPEC-SPLIT.png in this folder",
            writable_file,
        ),
    ),
    _command(
        "eval captioning",
        commands.eval_captioning,
        "greedy captions against those of the dataset: exact match, perplexity, BLEU, chrF, CIDEr",
        *DATA,
        _json("the result"),
        _argument(
            "--png",
            "OUT",
            "some images with their captions; else beside --json, or captioning-SPEC-SPLIT.png in this folder",
            writable_file,
        ),
        _argument("--samples", "N", "number of images in --png", positive, default=32),
    ),
    _command(
        "embed",
        commands.embed,
        "write a dataset's embeddings: arrays image, text (where there are captions) and key; float32 unit vectors",
        *DATA,
        _argument("--out", "FILE.npz", "file to write", writable_file, required=True),
    ),
    _command(
        "caption",
        commands.caption,
        "generate captions of images: greedily, by beam search (--beams), or by sampling (--temperature, --top-k, --top-p)",
        *RUN,
        _argument("images", "IMAGE", "image files, and SPECs of datasets: all images of each", nargs="+"),
        _argument("--split", None, "split of the datasets", default="test"),
        FIELDS[0],
        _json("image, caption and logprob (nats) of each"),
        _argument("--beams", "N", "beam search: keep the N best captions at each token", positive),
        _argument("--alpha", "A", "beam search: rank by log-probability / tokens ** A (default: 1)", float),
        _argument("--temperature", "T", "sample each token from softmax(logits / T), T > 0 (default: 1)", float),
        _argument("--top-k", "K", "sample among the K likeliest tokens (default: all)", positive),
        _argument("--top-p", "P", "sample among the likeliest tokens whose probabilities add up to P (default: 1)", float),
        _argument("--seed", "N", "seed of the sampling (default: 0)", int),
    ),
    _command(
        "export",
        weight_commands.export,
        "write a folder that open_clip or transformers loads as it is",
        *RUN,
        _argument("--to", None, "the library that will load it", required=True, choices=("open_clip", "transformers")),
        _argument("--out", "DIR", "a new folder, or that of an earlier export", local_folder, required=True),
        _argument(
            "--dtype", None, "of the weights (default: float32)", choices=("float32", "bfloat16", "float16"), default="float32"
        ),
        _argument("--verify", None, "load it in PyTorch and compare embeddings of the run's own examples", action="store_true"),
        _argument("--examples", None, "number of examples that --verify compares", positive, default=32),
    ),
    _command(
        "import",
        weight_commands.import_run,
        "make a workdir from another library's model, to evaluate, embed, caption or export it",
        _argument(
            "source", "SRC", "a folder of open_clip's or transformers', a model of the hub, or an .npz of big_vision's", local
        ),
        _argument("--from", None, "the library that wrote it", dest="origin", required=True, choices=ORIGINS),
        _argument("--out", "RUN", "a new workdir, local or on gs:// or s3://", writable_folder, required=True),
        _argument("--tokenizer", "FILE", "a tokenizer.json or SentencePiece model; else that of SRC", local),
        _argument("--image-size", "N", "side of the images in pixels, where SRC leaves it open", positive),
        _argument("--verify", None, "load SRC in PyTorch by its own library and compare embeddings", action="store_true"),
    ),
    _command(
        "average",
        weight_commands.average,
        "make a workdir with a weighted mean of runs' weights (WiSE-FT, soups), to evaluate, embed, export or start from it",
        _argument("runs", "RUN", "a workdir, local or on gs:// or s3://: its newest checkpoint, or RUN@STEP", nargs="+"),
        (
            _argument("--alpha", "X", "of two runs: (1 - X) times the first and X times the second, any number", float),
            _argument("--weights", "W", "each run's weight; they sum to 1. Default: all are equal", float, nargs="+"),
        ),
        RUN[1],
        _argument("--out", "RUN", "a new workdir, local or on gs:// or s3://", writable_folder, required=True),
    ),
    _command(
        "data prepare",
        data_commands.data_prepare,
        "build a dataset: emoji in the folder of TFDS, local or on gs:// or s3://, or openclipart in --out",
        _argument(
            "name",
            None,
            "emoji: from the system's colour-emoji font; openclipart: 5,409 drawings from two packages of Debian, 156 MB",
            choices=("emoji", "openclipart"),
        ),
        _argument("--out", "DIR", "a new folder for openclipart; else openclipart in this folder", local_folder),
    ),
    _command(
        "data index",
        data_commands.data_index,
        "make the index of tars, once: counts, and where each sample is; several hosts with the same --out share the work",
        _argument("spec", "SPEC", "wds:SHARDS: tars, folders, or names with braces or wildcards; several joined by ::"),
        _argument("--out", "DIR", "folder of the index; else beside the shards, or in the user's cache", writable_folder),
    ),
    _command(
        "data inspect",
        data_commands.data_inspect,
        "count, image sizes, captions, truncation, and a contact sheet",
        _argument("spec", "SPEC", SPEC),
        _argument("--split", None, "split of the dataset, or a share of it, as train#0-95", default="train"),
        *FIELDS,
        _argument("--tokenizer", "FILE", "a tokenizer.json; else a BPE is trained on the captions", place),
        _argument("--length", None, "tokens a caption may have, for the truncation statistics", positive, default=77),
        _argument("--png", "OUT", "the contact sheet; else SPEC-SPLIT.png in this folder", writable_file),
        _json("the statistics"),
    ),
    _command(
        "bench loss",
        commands.bench_loss,
        "the streamed losses beside dense ones: memory, FLOPs, collectives and time",
        _argument("--loss", None, "losses to measure", nargs="+", choices=LOSSES, default=LOSSES),
        _argument("--batch", "N", "global batch sizes, in pairs", positive, nargs="+", default=BATCHES),
        _argument("--width", None, "width of the embeddings", positive, default=512),
        _argument(
            "--travel",
            None,
            "how columns reach the other devices; auto: by size",
            choices=("ring", "gather", "auto"),
            default="auto",
        ),
        (
            _argument("--devices", "N", f"use N devices; else all, or {CPU_DEVICES} simulated on a CPU", positive),
            _argument("--topology", "T", "compile for chips that need not be present, as v5e:16x16 or h100:8; measures no time"),
        ),
        _argument("--turns", None, "timed runs of each form, in alternation", positive, default=7),
        _argument("--patience", "SECONDS", "a batch whose turns take longer is not timed", positive, default=15),
        _json("all figures"),
    ),
    _command(
        "bench step",
        commands.bench_step,
        "a run's train step on this machine's devices: seconds, images/s, memory, MFU; on random input, so it needs no data",
        _argument("--turns", "N", "timed turns, each of at least a second", positive, default=7),
        _json("all figures"),
        fields=True,
    ),
    _command(
        "bench input",
        commands.bench_input,
        "how fast this machine reads, decodes and tokenises a run's batches",
        _argument("--seconds", "N", "how long to read", positive, default=20),
        _json("all figures"),
        fields=True,
    ),
)
