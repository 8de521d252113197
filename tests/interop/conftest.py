"""A run with random weights, and 24 images of six classes with 30 captions, as a tsv and in memory."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from clipjax import config
from tests.evals.test_loaded import save
from tests.evals.tiny import MODEL

CLASSES = ("ant", "bee", "cow", "fox", "hen", "owl")
COLOURS = ("red", "green", "blue", "black")


@dataclasses.dataclass(frozen=True)
class Shown:
    """What both harnesses evaluate: example i is image i, its label and its captions."""

    images: tuple[Image.Image, ...]
    labels: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]
    tsv: str  # the same, as a SPEC


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """Its vectors are far enough from each other that no two of these examples tie."""
    run = config.Run(data=config.Data(spec="emoji", resize="crop"), model=MODEL, train=config.Train(steps=3000))
    return save(run, tmp_path_factory.mktemp("interop") / "tiny")


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (rng.integers(9, 30), rng.integers(9, 30), 3), np.uint8) for _ in range(24)]
    images = tuple(map(Image.fromarray, pixels))
    names = [f"{COLOURS[i // 6]} {CLASSES[i % 6]}" for i in range(24)]
    captions = tuple((name, f"a photo of a {name}")[: 1 + (i % 4 == 0)] for i, name in enumerate(names))
    rows = [f"{i}.png\t{caption}\t{CLASSES[i % 6]}" for i, found in enumerate(captions) for caption in found]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle\tclass", *rows]) + "\n")
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return Shown(images, tuple(i % 6 for i in range(24)), captions, f"tsv:{folder}/pairs.tsv")
