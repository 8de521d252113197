import jax
import numpy as np
import pytest
from PIL import Image

from clipjax.evals.encoder import Encoder
from clipjax.models import clip
from tests.evals.tiny import MODEL, SIZE, WORDS, mesh_of


@pytest.fixture(scope="session")
def params():
    # Larger weights than an initialisation's, so that images and texts are far from each other.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, clip.init(MODEL, 0))


@pytest.fixture(scope="session")
def model(params):
    return clip.bind(MODEL, params)


@pytest.fixture(scope="session", params=["1", "2x2x2"])
def encoder(request):
    return Encoder(MODEL, mesh_of(request.param), 13)


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(0).integers(0, 256, (37, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="session")
def tsv(tmp_path_factory, images):
    """Ten images of nine words: the third has two captions, the fifth can't be read, the last is of the first's word."""
    folder = tmp_path_factory.mktemp("tsv")
    rows = ["filepath\ttitle"]
    for i, word in enumerate([*WORDS[:9], WORDS[0]]):
        Image.fromarray(images[i]).save(folder / f"{i}.png")
        rows += [f"{i}.png\t{word}"] + [f"{i}.png\ta photo of the {word}"] * (i == 2)
    (folder / "4.png").write_bytes(b"no image")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    (folder / "names.txt").write_text("\n".join(WORDS) + "\n")
    return folder
