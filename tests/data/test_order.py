"""The order of the examples and every random choice are functions of (seed, step), recorded here as of clipjax 0.2: a run that is
resumed with another release, of clipjax or of Grain, goes on with the batches that it would have had."""

import io
import itertools
import zlib

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Data
from clipjax.data.pipeline import train_batches
from clipjax.data.source import Record, Source

PIXELS = io.BytesIO()
Image.new("RGB", (2, 2)).save(PIXELS, "ppm")
PIXELS = PIXELS.getvalue()
CAPTIONS = tuple(str(number) for number in range(1000))


class Numbers(Source):
    """`count` black images of a thousand captions each: which one is chosen shows the random generator."""

    name = "numbers"

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def _record(self, i):
        return Record(PIXELS, CAPTIONS, str(i))


class Digits:
    """A tokenizer whose only token is the caption's number."""

    length = 1

    def encode(self, texts):
        return np.array([[int(text)] for text in texts], np.int32), np.zeros(len(texts), bool)


def visits(n, batch_size, seed, steps, start=0):
    """int32 [steps * batch_size, 2]: each example's number, and the caption that was chosen."""
    where = dict(image_size=2, batch_size=batch_size, seed=seed, start_step=start)
    with train_batches(Numbers(n), Digits(), Data(spec="emoji", workers=1), **where) as batches:
        found = [np.stack([batch["index"], batch["text"][:, 0]], -1) for batch in itertools.islice(batches, steps)]
    return np.concatenate(found)


RECORDED = {  # (examples, batch size, seed, first step): CRC-32 of 20 batches
    (41, 8, 0, 0): 628000984,
    (41, 8, 2**32 - 1, 3): 38515424,
    (3426, 256, 5, 13): 3963076825,
    (4, 4, 0, 0): 4111643211,
    (1000, 3, 0, 10**9): 2424918046,
    (400_000_000, 64, 12345, 6_249_990): 576007211,
}


@pytest.mark.parametrize(("n", "batch_size", "seed", "start"), RECORDED)
def test_the_order_is_as_recorded(n, batch_size, seed, start):
    found = visits(n, batch_size, seed, 20, start)
    assert zlib.crc32(found.astype("<i4").tobytes()) == RECORDED[n, batch_size, seed, start]


def test_the_first_batches_are_as_recorded():
    """Of eleven examples, two batches of four are an epoch."""
    first = [1, 2, 4, 5, 9, 7, 10, 6], [9, 10, 1, 8, 2, 0, 3, 5], [7, 8, 2, 4]
    found = visits(11, 4, 0, 5)
    assert found[:, 0].tolist() == list(itertools.chain(*first))
    assert found[:4, 1].tolist() == [94, 519, 402, 242]
