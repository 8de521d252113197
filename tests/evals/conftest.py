import jax
import numpy as np
import pytest

from clipjax.evals.embed import Encoder
from clipjax.models import clip
from tests.evals.tiny import MESHES, MODEL, SIZE, mesh_of


@pytest.fixture(scope="session")
def params():
    # Larger weights than an initialisation's, so that pictures and texts are far from each other.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, clip.init(MODEL, 0))


@pytest.fixture(scope="session")
def model(params):
    return clip.bind(MODEL, params)


@pytest.fixture(scope="session", params=MESHES)
def encoder(request):
    return Encoder(MODEL, mesh_of(request.param), 13)


@pytest.fixture(scope="session")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (37, SIZE, SIZE, 3), np.uint8)
