"""A captioner learns eight images by heart, and writes what was said of them."""

import dataclasses

import jax
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.generate import Captioner
from clipjax.models import clip
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.step import jit_step, make_train_step
from tests.train import tiny


class Words:
    """What a captioner asks of a tokenizer."""

    start_id, pad_id, end_id = 398, 0, 399


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [0.0, 0.5])
def test_eight_images_by_heart(parallel):
    model = dataclasses.replace(tiny.COCA, decoder=dataclasses.replace(tiny.COCA.decoder, parallel=parallel))
    optim = config.Optim(lr=3e-3, weight_decay=0.0, clip_norm=1.0, schedule=config.Constant(warmup=10))
    run = tiny.run(model, optim=optim, train=dataclasses.replace(tiny.TRAIN, steps=300, batch_size=8))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 398, (8, model.text.length), np.int32)
    for row, end in zip(tokens, (2, 3, 4, 5, 6, 7, 7, 3), strict=True):
        row[0], row[end], row[end + 1 :] = Words.start_id, Words.end_id, Words.pad_id
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    mesh = tiny.mesh_of(2)
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(model, 0)))
    state = initial_state(run, tx, mesh)
    step = jit_step(make_train_step(run, tx, mesh), state, mesh)
    for i in range(run.train.steps):
        index = np.arange(8 * i, 8 * i + 8, dtype=np.int32)  # of other examples, for what is drawn by it
        state, metrics = step(state, sharding.to_global(dict(image=images, text=tokens, index=index), mesh))
    written = Captioner(model, mesh, 8, Words()).generate(
        state.params, *sharding.to_global(dict(i=images, n=index), mesh).values()
    )
    np.testing.assert_array_equal(written.tokens, tokens)
    if not parallel:  # else half of what is foreseen has only the image to go by
        assert metrics["caption_loss"] < 0.05
        assert float(np.exp(written.logprob).min()) > 0.8
