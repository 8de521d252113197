"""Where images and captions come from: opens what a SPEC names."""

from clipjax import config
from clipjax.data.source import Source
from clipjax.files import local_path


def open_source(data: config.Data) -> Source:
    """The source that `data.spec` and `data.split` name, or the mixture of `data.sources`. `emoji` is built first if it does not
    exist yet.

    Raises ConfigError, which names the valid ones, for an unknown dataset, split or field."""
    if data.sources:
        from clipjax.data.mixture import Mixture

        return Mixture([open_source(part) for part in data.parts], data)
    kind, _, rest = data.spec.partition(":")
    match kind:
        case "emoji":
            from clipjax.data.tfds_source import open_emoji

            return open_emoji(data)
        case "tfds":
            from clipjax.data.tfds_source import Tfds, find_dataset

            return Tfds(data, find_dataset(data.spec, rest))
        case "tsv":
            from clipjax.data.tsv import Tsv

            return Tsv(data, local_path("data.spec", rest).expanduser())
    raise config.ConfigError(f"data.spec = {data.spec!r}: can't be read yet")
