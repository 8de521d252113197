"""The command line: `clipjax COMMAND --help` tells each command's options, units and defaults.

Exit status: 0 fine, 1 failed (a non-finite loss, a full disk, a verification that does not hold), 2 wrong use; `train` also 75:
told to stop, it has saved its state, and the same command goes on; and 130, the same after Ctrl-C.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import clipjax
from clipjax import commands, config, environment, preemption
from clipjax.arguments import Help, local_folder, positive, writable_file, writable_folder
from clipjax.bench import BATCHES, CPU_DEVICES, LOSSES

SPEC = "emoji, tfds:NAME[/CONFIG][:VERSION], or tsv:FILE with columns filepath and title"
RUN = "a workdir of `clipjax train`, local or on gs:// or s3://: its newest checkpoint, or RUN@STEP"


def program() -> None:
    """The entry point: starts itself once more where the environment has yet to tell libraries something, then runs `main`."""
    if sys.platform == "linux" and not environment.MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, environment.wanted() | os.environ)
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args, rest = _parser().parse_known_args(argv)
    args.rest = rest
    if rest and "config" not in args:  # which has options of its own
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_ToStderr()])
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant so, as of a folder that is only read
    unforeseen = False
    try:
        status, message = args.run(args) or 0, None
    except (config.ConfigError, argparse.ArgumentTypeError) as error:
        status, message = 2, error
    except OSError as error:  # one that names a file is the user's to mend
        status, message = (2, f"{error.filename}: {error.strerror}") if error.filename else (1, error)
    except FloatingPointError as error:
        status, message = 1, error
    except preemption.Preempted as stopped:
        status, message = stopped.status, stopped
    except KeyboardInterrupt:
        again = "; the same command goes on from the newest checkpoint" if args.run is commands.train else ""
        status, message = 130, f"interrupted{again}"
    except Exception:
        if not _distributed():
            raise
        status, message, unforeseen = 1, traceback.format_exc(), True
    if joined := _distributed():  # one's end is everyone's, and one of them tells
        message = joined.leave(status, message, unforeseen)
    if message is not None:
        print(f"clipjax: {message}", file=sys.stderr)
    return status


def _distributed() -> ModuleType | None:
    """clipjax.distributed, where the command has joined this process to others."""
    if "jax" not in sys.modules:  # it needed no devices
        return None
    from clipjax import distributed

    return distributed if distributed.joined() else None


class _ToStderr(logging.Handler):
    """To what is sys.stderr at the time: the progress line stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipjax", description=clipjax.__doc__)
    parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    def group(name: str, text: str) -> argparse._SubParsersAction:
        return top.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="WHAT")

    def command(under: argparse._SubParsersAction, name: str, run: object, text: str, **kw: bool) -> argparse.ArgumentParser:
        made = under.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False, **kw)
        made.set_defaults(run=run, parser=made)
        return made

    def of_run(p: argparse.ArgumentParser, split: str = "test") -> None:
        p.add_argument("workdir", metavar="RUN", help=RUN)
        p.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
        p.add_argument("--split", default=split, help="part of the dataset")

    def of_config(under: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
        p = command(under, name, run, text, add_help=False)
        what = "a Python file with config() -> clipjax.config.Run, or a name that `clipjax configs` lists"
        p.add_argument("config", nargs="?", metavar="CONFIG.py|NAME", help=what)
        p.add_argument(
            "-h", "--help", action="store_true", help="this; after CONFIG.py|NAME all its fields, each of which is an option"
        )
        return p

    p = of_config(top, "train", commands.train, "train a model, or go on from its workdir's newest checkpoint")
    p.add_argument("--workdir", type=writable_folder, metavar="RUN", help="folder of the run, local or on gs:// or s3://")

    p = command(top, "configs", commands.configs, "list the configs that come with clipjax, or print one to start from")
    p.add_argument("name", nargs="?", metavar="NAME", help="print this one")

    text = "compile a run's train step for chips that need not be there: memory, sharding, collectives, FLOPs, estimated time"
    p = of_config(top, "plan", commands.plan, text)
    where = "TPUs, as v5e:16x16, v5p:4x4x8 or v6e:8x8; cpu:N, simulated; else the devices that are here"
    p.add_argument("--topology", metavar="T", help=where)
    p.add_argument("--slices", type=positive, default=1, metavar="N", help="so many of them, joined by the data-centre network")
    largest = "also find the largest batch that fits, of powers of two, with the configured train.micro_batches"
    p.add_argument("--find-batch", action="store_true", help=largest)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write all figures here")

    evals = group("eval", "evaluate a run")
    p = command(evals, "zeroshot", commands.eval_zeroshot, "zero-shot classification: acc1, acc5, mean-per-class recall")
    of_run(p)
    p.add_argument("--classnames", metavar="FILE", help="one name a line, in the order of the labels; else the dataset's own")
    templates = "simple (7 prompts a class), imagenet (80), plain (the name alone), or a file with one {c} a line"
    p.add_argument("--templates", default="simple", metavar="NAME|FILE", help=templates)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result here")
    p = command(evals, "retrieval", commands.eval_retrieval, "image-text retrieval: recall at 1, 5 and 10 in both directions")
    of_run(p)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result here")

    p = command(
        evals, "geometry", commands.eval_geometry, "the contrastive gap and its kin: distances, separability, uniformity, RankMe"
    )
    of_run(p)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result, with curves of explained variance")
    picture = "both clouds and their spectra; else beside --json, or geometry-SPEC-SPLIT.png in this folder"
    p.add_argument("--png", type=writable_file, metavar="OUT", help=picture)

    text = "captions written greedily, against those of the dataset: exact match, perplexity, BLEU, chrF, CIDEr"
    p = command(evals, "captioning", commands.eval_captioning, text)
    of_run(p)
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write the result here")
    picture = "some pictures with their captions; else beside --json, or captioning-SPEC-SPLIT.png in this folder"
    p.add_argument("--png", type=writable_file, metavar="OUT", help=picture)
    p.add_argument("--samples", type=positive, default=32, metavar="N", help="how many pictures")

    p = command(top, "embed", commands.embed, "write a dataset's embeddings: arrays image, text and key, float32 unit vectors")
    of_run(p)
    p.add_argument("--out", type=writable_file, required=True, metavar="FILE.npz", help="where to write")

    text = "write captions of pictures: greedily, with --beams or --alpha by beam search, else with any of the last four drawn"
    p = command(top, "caption", commands.caption, text)
    p.add_argument("workdir", metavar="RUN", help=RUN)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files of pictures")
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write image, caption and logprob (nats) of each")
    p.add_argument("--beams", type=positive, metavar="N", help="beam search: the best of N captions written side by side")
    p.add_argument("--alpha", type=float, metavar="A", help="it ranks by log-probability / tokens ** A (default: 1)")
    p.add_argument("--temperature", type=float, metavar="T", help="draw each token from softmax(logits / T), T > 0 (default: 1)")
    p.add_argument("--top-k", type=positive, metavar="K", help="draw among the K likeliest tokens (default: all)")
    p.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that together make up P (default: 1)")
    p.add_argument("--seed", type=int, metavar="N", help="of what is drawn (default: 0)")

    p = command(top, "export", commands.export, "write a folder that open_clip or transformers loads as it is")
    p.add_argument("workdir", metavar="RUN", help=RUN)
    p.add_argument("--to", required=True, choices=("open_clip", "transformers"), help="the library that shall load it")
    p.add_argument("--out", type=local_folder, required=True, metavar="DIR", help="a new folder, or that of an earlier export")
    p.add_argument("--verify", action="store_true", help="load it in PyTorch and compare embeddings of the run's own examples")
    p.add_argument("--examples", type=positive, default=32, help="how many --verify compares")

    text = "make a run's workdir of another library's model, to evaluate, embed, caption or export it"
    p = command(top, "import", commands.import_run, text)
    p.add_argument("source", type=Path, metavar="SRC", help="a folder: open_clip_config.json, .safetensors and tokenizer.json")
    p.add_argument("--from", dest="origin", required=True, choices=("open_clip",), help="the library that wrote it")
    p.add_argument("--out", type=writable_folder, required=True, metavar="RUN", help="a new workdir, local or on gs:// or s3://")

    data = group("data", "prepare or look at a dataset")
    p = command(data, "prepare", commands.data_prepare, "build a dataset that clipjax makes itself, in TFDS's folder")
    p.add_argument("name", choices=("emoji",), help="emoji: from the system's colour-emoji font")
    p = command(data, "inspect", commands.data_inspect, "count, sizes, captions, truncation, and a contact sheet")
    p.add_argument("spec", metavar="SPEC", help=SPEC)
    p.add_argument("--split", default="train", help="part of the dataset")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; else a BPE is trained on the captions")
    p.add_argument("--length", type=positive, default=77, help="tokens a caption may have, for the truncation statistics")
    p.add_argument("--png", type=writable_file, metavar="OUT", help="the contact sheet; else SPEC-SPLIT.png in this folder")

    benches = group("bench", "measure")
    p = command(
        benches, "loss", commands.bench_loss, "the streamed losses beside dense ones: memory, FLOPs, collectives and time"
    )
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
    text = "a run's train step on the devices here: seconds, images/s, memory, MFU; on noise, so without data"
    p = of_config(benches, "step", commands.bench_step, text)
    p.add_argument("--turns", type=positive, default=7, metavar="N", help="timed turns, of a second at least")
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write all figures here")
    p = of_config(benches, "input", commands.bench_input, "how fast a run's batches are read, decoded and tokenised here")
    p.add_argument("--seconds", type=positive, default=20, metavar="N", help="how long to read")
    p.add_argument("--json", type=writable_file, metavar="OUT", help="also write all figures here")
    return parser


if __name__ == "__main__":
    program()
