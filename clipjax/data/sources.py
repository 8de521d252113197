"""Where images and captions come from: opens what a SPEC names."""

import dataclasses

from clipjax import config
from clipjax.config.data import dataset_name
from clipjax.data.source import Source
from clipjax.data.split import Share, parse_split


def open_source(data: config.Data) -> Source:
    """The source that `data.spec` and `data.split` name, or the mixture of `data.sources`. `emoji` is built first if it does not
    exist yet.

    Raises ConfigError, which names the valid ones, for an unknown dataset, split or field."""
    if data.sources:
        from clipjax.data.ordering.mixture import Mixture

        return Mixture([open_source(part) for part in data.parts], data)
    split, share = parse_split(data.split)
    if share is not None:
        return Share(open_source(dataclasses.replace(data, split=split)), *share, dataset_name(data.spec, data.split))
    kind, _, rest = data.spec.partition(":")
    match kind:
        case "emoji":
            from clipjax.data.formats.tfds_source import open_emoji

            return open_emoji(data)
        case "tfds":
            from clipjax.data.formats.tfds_source import Tfds, find_dataset

            return Tfds(data, find_dataset(data.spec, rest))
        case "csv" | "tsv":
            from clipjax.data.formats.table import Table

            return Table(data, rest)
        case "wds":
            from clipjax.data.formats.wds import Wds

            return Wds(data, rest)
        case "parquet":
            from clipjax.data.formats.parquet import Parquet

            return Parquet(data, rest)
        case "karpathy":
            from clipjax.data.formats.karpathy import Karpathy

            return Karpathy(data, rest)
        case _:  # folder: `config.Data` takes no others
            from clipjax.data.formats.folder import Folder

            return Folder(data, rest)
