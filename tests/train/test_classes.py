"""Class vectors in training: gradients on every mesh and with micro-batches, where they are, checkpoints, and who reads them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import cli, config, losses, sharding
from clipjax.config import Classes, Classify, ConfigError, Rule
from clipjax.losses.pairwise import tiles
from clipjax.models import clip
from clipjax.plan.flops import step_flops
from clipjax.restore import restore
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import abstract_state
from tests.evals.test_loaded import save
from tests.evals.tiny import MODEL as EVALUATED
from tests.losses.test_classify import class_loss
from tests.train import tiny
from tests.train.test_accumulate import EIGHT, MIXED, OVER_DATA, assert_close, batch_of, gradient, named, program, run_of

COUNT, ROWS, WIDTH = 21, 1024, 16
MODEL = dataclasses.replace(tiny.CLIP, classes=Classes(count=COUNT))
TERMS = (config.Softmax(weight=0.5), Classify(loss="mlcd", weight=2.0))
DATA = config.Data(spec="emoji", labels="labels.npz")
RUN = run_of(model=MODEL, size=32, objective=TERMS, data=DATA)


def test_gradients_on_meshes_and_with_micro_batches(monkeypatch):
    """Against the loss written out. No device has the whole matrix, or the logits of all classes."""
    monkeypatch.setattr(tiles, "GATHER", 0)  # as for matrices above 32 MiB
    batch = batch_of(RUN)

    def loss(params):
        model = clip.bind(RUN.model, params)
        image, text, w = model.encode_image(batch["image"]), model.encode_text(batch["text"]), params["classes"]
        of_classes = class_loss(image[:, None], w, batch["label"], 16.0, form="mlcd")
        return losses.clip_loss(image, text, jnp.exp(params["log_scale"])) / 2 + 2 * of_classes

    value, by_hand = jax.jit(jax.value_and_grad(loss))(clip.init(RUN.model, RUN.seed))
    want = named(by_hand)
    assert np.abs(want["classes"][:COUNT]).max() > 1e-3
    for shape, micro_batches, mesh in ((MIXED, 2, config.Mesh()), (EIGHT, 4, OVER_DATA)):
        run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, micro_batches=micro_batches), mesh=mesh)
        got, logged = gradient(run, shape, batch)
        assert_close(got, want)
        assert not got["classes"][COUNT:].any()
        assert logged["loss"] == pytest.approx(float(value), rel=1e-6)
        text = program(run, shape)[0].as_text()
        assert not re.search(rf"\[{ROWS},{WIDTH}\]|\[32,{ROWS}\]", text)


def test_the_state_has_a_part_on_each_device_of_the_batch():
    """With a rule of its own, and the moments. The moving average is without class vectors."""
    optim = dataclasses.replace(tiny.OPTIM, ema=0.9, rules=(Rule(pattern="classes", lr=0.5), *config.RULES))
    run = dataclasses.replace(RUN, optim=optim, mesh=OVER_DATA)
    tx = optimizer_of(run, jax.eval_shape(lambda: clip.init(run.model, 0)))
    state = abstract_state(run, tx, tiny.mesh_of(2, 2, 2))
    placed = [x for path, x in jax.tree.leaves_with_path(state) if "classes" in sharding.keystr(path)]
    assert [x.sharding.shard_shape(x.shape) for x in placed] == 3 * [(ROWS // 4, WIDTH)]
    assert "classes" not in state.ema
    assert "classes" not in dataclasses.replace(state, ema=None).evaluated


def test_a_mesh_that_does_not_divide_the_rows_is_refused():
    with pytest.raises(ConfigError, match=r"model.classes = .*count=21.*: .* 1,024 rows, which 6 devices"):
        sharding.check_classes(MODEL, tiny.mesh_of(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=tiny.CLIP), r"model.classes = None: objective.0 needs them"),
        (dict(data=config.Data(spec="emoji")), r"data.labels = None: objective.0 needs them"),
        (
            dict(model=dataclasses.replace(MODEL, classes=Classes(count=9, width=8))),
            r"model.classes = .*width=8.*: objective.0 needs .*width=16",
        ),
        (dict(objective=(Classify(head="a"),)), r"objective.0.head = 'a': must name one of model.heads that has image"),
        (dict(objective=(Classify(sampled=0.0),)), r"objective.0.sampled = 0.0: must lie in \(0, 1\]"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_of(**(dict(model=MODEL, objective=(Classify(),), data=DATA) | changes))


def test_flops():
    flops = step_flops(RUN, ["classes"])
    assert flops["classify loss"] == 8 * 32 * COUNT * WIDTH
    sampled = dataclasses.replace(RUN, objective=(Classify(sampled=0.5, head=None),))
    assert step_flops(sampled, ["classes"])["classify loss"] == 4 * 32 * COUNT * WIDTH


def test_a_checkpoint_opens_on_another_mesh_and_nothing_but_training_reads_class_vectors(tmp_path):
    model = dataclasses.replace(EVALUATED, classes=Classes(count=5))
    run = config.Run(data=DATA, model=model, objective=(Classify(),))
    folder = save(run, tmp_path / "run")
    want, mesh = clip.init(model, 0)["classes"], tiny.mesh_of(4)
    state = restore(folder, 1, abstract_state(run, optimizer_of(run, clip.init(model, 0)), mesh))
    np.testing.assert_allclose(state.params["classes"], want, rtol=3e-7)
    assert state.params["classes"].addressable_shards[0].data.shape == (ROWS // 4, want.shape[1])
    assert "classes" not in clipjax.load(folder).params
    assert config.start_from(folder, data=dict(spec="emoji")).model.classes is None
    assert cli.main(["average", str(folder), f"{folder}@1", "--alpha", "0.5", "--out", str(tmp_path / "mean")]) == 0
    assert "classes" not in clipjax.load(tmp_path / "mean").params
    found = tiny.opened(
        dataclasses.replace(run, objective=(config.Softmax(),), init=config.Init(run=str(folder))), tmp_path / "new"
    )
    assert found.origin.found.fresh.keys() == {"classes"}
