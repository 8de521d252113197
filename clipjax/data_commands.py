"""What the commands of the group `data` do, given their parsed arguments. As in commands.py, each imports what it needs."""

import argparse
from pathlib import Path

from clipjax import config
from clipjax.arguments import writable_file
from clipjax.commands import wrong_use


def data_prepare(args: argparse.Namespace) -> None:
    """`clipjax data prepare`: builds a dataset, unless it exists, and prints its folder."""
    if args.style and args.name != "emoji":
        wrong_use(args, "--style: only of emoji")
    if args.name == "openclipart":
        from clipjax.data.sets.openclipart import NEXT, prepare_openclipart

        folder = args.out or Path("openclipart")
        print(prepare_openclipart(folder).partition("---\n# ")[2], NEXT.format(folder=folder), sep="\n")
        return
    if args.out is not None:
        wrong_use(args, "--out: emoji is built in the folder of TFDS: set TFDS_DATA_DIR")
    from clipjax.data.formats.tfds_source import data_dir
    from clipjax.data.sets.emoji import EmojiTwitter, prepare, prepare_emoji

    if args.style:
        from clipjax.data.sets.twitter import Twitter

        print(prepare(EmojiTwitter, Twitter(), data_dir()))
    else:
        print(prepare_emoji(data_dir()))


def data_index(args: argparse.Namespace) -> None:
    """`clipjax data index`: makes the index of tars, unless it exists, and prints what it holds."""
    from clipjax.data.formats.indexing import index_command

    print(index_command(args.spec, None if args.out is None else str(args.out)))


def data_inspect(args: argparse.Namespace) -> None:
    """`clipjax data inspect`: prints statistics of a dataset and draws a contact sheet."""
    from clipjax.data.inspect import describe, inspect
    from clipjax.data.tokenizer import Tokenizer
    from clipjax.evals.report import png_name
    from clipjax.files import write_json

    tokenizer = Tokenizer.load(args.tokenizer, args.length) if args.tokenizer else None
    sheet = args.png or writable_file(png_name(f"{args.spec}-{args.split}"))
    fields = dict(image_field=args.image_field, text_field=args.text_field, label_field=args.label_field)
    report = inspect(config.Data(spec=args.spec, split=args.split, **fields), tokenizer, sheet, length=args.length)
    print(describe(report))
    if args.json:
        write_json(args.json, report)
    remedy = f"none of the {report['examples_looked_at']:,} images looked at can be read"
    config.require(bool(report["width"]), "SPEC", args.spec, remedy)
    print(f"contact sheet: {sheet}")
