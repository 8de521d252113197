"""Datasets that every test of this room can read: emoji built once, and a folder of images that encode their index."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipjax.data.sets.emoji import prepare_emoji
from clipjax.data.tokenizer import Tokenizer

IMAGES = 41


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
    """A tfds data_dir that holds all of emoji."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare_emoji(folder)
    return folder


@pytest.fixture
def emoji_dataset(emoji_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(emoji_dir))
    return emoji_dir


def write_tsv(folder: Path, rows: list[tuple[str, str]], header: str = "filepath\ttitle") -> Path:
    path = folder / "pairs.tsv"
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def images_tsv(tmp_path_factory):
    """A tsv of 41 noisy images; the caption of number i is `number i`, its mean red is 4 i."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        pixels[..., 0] = 4 * i
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return write_tsv(folder, [(f"{i}.png", f"number {i}") for i in range(IMAGES)])


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([f"number {i}" for i in range(IMAGES)], 300, lowercase=True, length=8)
