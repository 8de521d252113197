import json

import jax
import numpy as np
import pytest

import clipjax
from clipjax import config
from clipjax.checkpoint import Checkpoints
from clipjax.evals.loaded import mesh_for
from clipjax.models import clip
from clipjax.sharding import make_mesh
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.workdir import save_config
from tests.evals.tiny import MODEL, TOKENIZER, WORDS


@pytest.mark.parametrize(
    ("trained", "available"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 4, 1), (2, 4, 1)),
        ((32, 4, 2), (1, 4, 2)),  # on 256 devices
        ((1, 2, 1), (4, 2, 1)),  # on two
        ((2, -1, 1), (2, 4, 1)),
        ((16, -1, 1), (8, 1, 1)),
        ((-1, 16, 1), (8, 1, 1)),
    ],
)
def test_the_mesh_is_that_of_training_where_it_fits(trained, available):
    assert tuple(mesh_for(config.Mesh(**dict(zip(("data", "fsdp", "tensor"), trained, strict=True)))).shape.values()) == (
        1,
        *available,
    )


def test_a_run_is_loaded_in_shards(tmp_path):
    """A model that is trained with fsdp and tensor is evaluated with them. The vectors are those of a single axis."""
    run = config.Run(
        data=config.Data(spec="emoji"), model=MODEL, mesh=config.Mesh(fsdp=2, tensor=2), train=config.Train(steps=3000)
    )
    mesh = make_mesh(run.mesh)
    state = initial_state(run, make_optimizer(run.optim, 3000, jax.eval_shape(lambda: clip.init(MODEL, 0))), mesh)
    save_config(run, tmp_path)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(1, state)
    sharded = clipjax.load(tmp_path)
    assert dict(sharded.mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    kernel = sharded.params["text"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    seen = sharded.encode_text(WORDS)

    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"mesh": {"data": -1, "fsdp": 16, "tensor": 1}}))
    plain = clipjax.load(tmp_path)
    assert dict(plain.mesh.shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1}
    np.testing.assert_allclose(plain.encode_text(WORDS), seen, atol=1e-6)
