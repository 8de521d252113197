"""Where images and captions come from: `emoji`, `tfds:NAME[/CONFIG][:VERSION]` or `tsv:FILE`, all read by index."""

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.source import Source
from clipjax.data.tsv import Tsv
from clipjax.files import local_path


def open_source(data: config.Data) -> Source:
    """The source that `data.spec` and `data.split` name. `emoji` is built first if it does not exist yet.

    Raises ConfigError, which names the valid ones, for an unknown spec, dataset, split or field."""
    kind, _, rest = data.spec.partition(":")
    match kind:
        case "emoji" if not rest:
            from clipjax.data.tfds_source import open_emoji

            return open_emoji(data)
        case "tfds" if rest:
            from clipjax.data.tfds_source import Tfds, find_dataset

            return Tfds(data, find_dataset(data.spec, rest))
        case "tsv" if rest:
            return Tsv(data, local_path("data.spec", rest).expanduser())
    raise ConfigError(f"data.spec = {data.spec!r}: must be emoji, tfds:NAME[/CONFIG][:VERSION] or tsv:FILE")
