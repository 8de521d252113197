"""The images that `clipjax caption` is given: files, and all images of datasets."""

import os
from collections.abc import Sequence

from PIL import Image

from clipjax import config
from clipjax.config.data import KINDS
from clipjax.data.pipeline import eval_batches
from clipjax.data.sources import open_source
from clipjax.evals.given import ImageLike
from clipjax.evals.inputs import eval_data

BATCH = 64  # images of a dataset that are read at a time


def pictures(run: config.Run, wanted: Sequence[str], split: str, image_field: str | None) -> tuple[list[str], list[ImageLike]]:
    """The name of each image, and the image: a file's path, which is read later, or an example of a dataset, cut to the square
    that the model sees; its name is the key.

    `wanted`: paths and SPECs. An example whose image can't be used is left out, with a warning. Raises ConfigError as
    `open_source` does."""
    names: list[str] = []
    images: list[ImageLike] = []
    for word in wanted:
        if not _is_spec(word):
            names.append(word)
            images.append(word)
            continue
        data = eval_data(run.data, word, split, image_field=image_field)
        source = open_source(data)
        size = run.model.image.image_size
        with eval_batches(source, data, image_size=size, batch_size=BATCH) as batches:
            for batch in batches:
                names += [source.text(i).key for i in batch["index"][batch["mask"]].tolist()]
                images += map(Image.fromarray, batch["image"][batch["mask"]])
    return names, images


def _is_spec(word: str) -> bool:
    """Whether a word names a dataset. A file of that name comes first."""
    kind, colon, _ = word.partition(":")
    return kind in KINDS and bool(colon or word == "emoji") and not os.path.exists(word)
