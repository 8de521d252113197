"""Where images and captions come from: `emoji`, `tfds:NAME[/CONFIG][:VERSION]` or `tsv:FILE`, all read by index."""

from clipjax import config
from clipjax.data.source import Source
from clipjax.data.tsv import Tsv
from clipjax.files import local_path


def open_source(data: config.Data) -> Source:
    """The source that `data.spec` and `data.split` name. `emoji` is built first if it does not exist yet.

    Raises ConfigError, which names the valid ones, for an unknown dataset, split or field."""
    kind, _, rest = data.spec.partition(":")
    match kind:
        case "emoji":
            from clipjax.data.tfds_source import open_emoji

            return open_emoji(data)
        case "tfds":
            from clipjax.data.tfds_source import Tfds, find_dataset

            return Tfds(data, find_dataset(data.spec, rest))
        case _:  # tsv: `config.Data` takes no others
            return Tsv(data, local_path("data.spec", rest).expanduser())
