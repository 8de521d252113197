"""Fixtures for the tests of exports."""

import numpy as np
import pytest
from PIL import Image

from clipjax.data.tokenizer import Tokenizer
from tests.export.models import CAPTIONS, LENGTH, TEXT, WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "tokenizer.json"
    Tokenizer.train(WORDS.split() * 3 + CAPTIONS, TEXT["vocab_size"], True, LENGTH).save(path)
    return path


@pytest.fixture(scope="module")
def images():
    """Smooth images of several shapes, larger and smaller than the towers' input."""
    rng = np.random.default_rng(0)
    shapes = [(136, 128), (128, 136), (50, 90), (64, 64), (21, 30)]
    coarse = [Image.fromarray(rng.integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)) for w, h in shapes]
    return [c.resize(shape, Image.Resampling.BICUBIC) for c, shape in zip(coarse, shapes, strict=True)]
